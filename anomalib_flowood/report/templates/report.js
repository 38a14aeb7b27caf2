const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
const drawing = (tag, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};

// Python writes "inf", which is no number here.
const numberOf = (value) => Number(String(value).replace("inf", "Infinity"));
const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);

// ---- Tables that are sorted by their headings ----
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = make("button", { type: "button" }, ...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const next = now ? (now === "ascending" ? "descending" : "ascending") : head.dataset.first;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const number = head.classList.contains("number");
      const key = (row) => row.cells[column].dataset.value;
      // A number that is not there comes last, whichever way.
      const order = (a, b) => {
        const x = key(a), y = key(b);
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        return sign * (number ? compare(numberOf(x), numberOf(y)) : x.localeCompare(y, undefined, { numeric: true }));
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}

// ---- Charts: those that come into view can be explored; the drawing stays where that fails ----
const explore = (figure) => {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const still = figure.querySelector("svg");
  spec.width = "container";
  spec.description = still.getAttribute("aria-label");
  const place = make("div");
  figure.append(place);
  // ast: expressions are interpreted, since the page's policy lets no text become code.
  const options = { renderer: "svg", ast: true, mode: "vega-lite", tooltip: { theme: "custom" }, actions: false };
  return vegaEmbed(place, spec, options).then(
    () => still.remove(),
    () => place.remove(),
  );
};
const charts = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    charts.unobserve(entry.target);
    explore(entry.target);
  }
}, { rootMargin: "200px" });
for (const figure of document.querySelectorAll(".chart")) charts.observe(figure);

// ---- Images that open ----
const viewer = document.getElementById("viewer");
let shown = [], at = 0, opener = null;
const show = (place) => {
  at = (place + shown.length) % shown.length;
  const { svg, text } = shown[at];
  const plain = svg.cloneNode(true);
  plain.querySelectorAll(".map, .truth").forEach((layer) => layer.remove());
  const pair = make("div", { class: "pair" }, plain);
  if (svg.querySelector(".map, .truth")) pair.append(svg.cloneNode(true));
  const button = (name, act) => {
    const element = make("button", { type: "button", class: "button" }, name);
    element.addEventListener("click", act);
    return element;
  };
  const previous = button("← Previous", () => show(at - 1)), next = button("Next →", () => show(at + 1));
  const close = button("Close", () => viewer.close());
  previous.disabled = next.disabled = shown.length < 2;
  const focused = viewer.contains(document.activeElement) ? document.activeElement.textContent : "";
  viewer.replaceChildren(pair, make("p", {}, text), make("div", { class: "bar" }, previous, next, close));
  ([...viewer.querySelectorAll("button")].find((one) => one.textContent === focused) ?? close).focus();
};
viewer.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") show(at - 1);
  if (event.key === "ArrowRight") show(at + 1);
});
viewer.addEventListener("close", () => opener?.focus());
const opens = (button, images, place) => button.addEventListener("click", () => {
  [shown, opener] = [images, button];
  viewer.showModal();
  show(place);
});
for (const list of document.querySelectorAll(".tiles")) {
  const items = [...list.querySelectorAll("li")].filter((item) => item.querySelector(".tile"));
  const images = items.map((item) => {
    const svg = item.querySelector(".tile");
    const words = [...item.childNodes].filter((node) => !node.classList?.contains("frame"));
    return { svg, text: `${svg.getAttribute("aria-label")}: ${words.map((node) => node.textContent.trim()).filter(Boolean).join(", ")}` };
  });
  items.forEach((item, place) => {
    const frame = item.querySelector(".frame");
    const button = make("button", { type: "button", class: "open" }, ...frame.childNodes);
    frame.replaceWith(button);
    opens(button, images, place);
  });
}

// ---- All test images: search, filter, sort, pages, CSV ----
const PAGE = 50;
const HEADINGS = [["image", "text"], ["source", "text"], ["label", "text"], ["score", "number"], ["outcome", "text"]];
// What a spreadsheet would take for a formula gets an apostrophe, as in the run's own tables.
const quoted = (value) => {
  const text = typeof value === "string" && /^'*[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};
const outcome = (label, score, threshold) => {
  if (threshold === null) return "";
  const alarm = score > threshold;
  return label ? (alarm ? "found" : "missed") : (alarm ? "false alarm" : "no alarm");
};
const rowsOf = (data, { list, scores, threshold }) => {
  const { start, paths, sources, source, label } = data.lists[list];
  return paths.map((path, row) => {
    const score = numberOf(scores[row]);
    return { row, shown: path, image: start + path, source: sources[source[row]], label: label[row] ? "outside" : "inside", score, outcome: outcome(label[row], score, threshold) };
  });
};
const setUp = (box, number) => {
  const data = JSON.parse(box.querySelector("script").textContent);
  let rows = [], found = [], page = 0, sorted = ["score", "descending"];
  const select = (name, options) => {
    const element = make("select", {}, ...options.map(([value, text]) => make("option", { value }, text)));
    return [element, make("label", {}, make("span", {}, name), element)];
  };
  const search = make("input", { type: "search", placeholder: "part of a name" });
  const [detector, detectorLabel] = select("Detector", data.detectors.map(({ name }, place) => [place, name]));
  const [source, sourceLabel] = select("Source", []);
  const [result, resultLabel] = select("Outcome", []);
  const csv = make("button", { type: "button", class: "button" }, "Save as CSV");
  const controls = make("div", { class: "controls" }, make("label", {}, make("span", {}, "Search"), search), sourceLabel, resultLabel, csv);
  if (data.detectors.length > 1) controls.prepend(detectorLabel);
  const head = make("tr");
  const body = make("tbody");
  const table = make("table", {}, make("thead", {}, head), body);
  const count = make("span", { role: "status" });
  const previous = make("button", { type: "button", class: "button" }, "← Previous");
  const next = make("button", { type: "button", class: "button" }, "Next →");
  const cells = HEADINGS.map(([name, kind]) => {
    const button = make("button", { type: "button" }, name);
    const cell = make("th", { scope: "col", class: kind }, button);
    button.addEventListener("click", () => {
      const turned = sorted[1] === "ascending" ? "descending" : "ascending";
      sorted = [name, sorted[0] === name ? turned : kind === "number" ? "descending" : "ascending"];
      update();
    });
    return [name, cell];
  });
  head.append(...cells.map(([, cell]) => cell));
  box.append(
    controls,
    make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "All test images" }, table),
    make("div", { class: "bar" }, previous, next, count),
  );
  const current = () => data.detectors[detector.value || 0];
  const draw = () => {
    const { pictures } = data.lists[current().list];
    const part = found.slice(page * PAGE, (page + 1) * PAGE);
    const images = [];
    body.replaceChildren(...part.map((item) => {
      const name = make("th", { scope: "row", class: "text", title: item.image }, item.shown || item.image);
      const picture = pictures[item.row];
      if (picture) {
        const [id, width, height] = picture;
        const svg = drawing("svg", { class: "tile", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": item.image });
        svg.append(drawing("use", { href: `#${id}` }));
        const button = make("button", { type: "button", class: "open" }, svg);
        opens(button, images, images.length);
        images.push({ svg, text: `${item.image}: ${item.score}, ${item.source}, ${item.outcome}` });
        name.prepend(button);
      }
      const text = (value) => make("td", { class: "text" }, value);
      const score = make("td", {}, Number.isFinite(item.score) ? item.score.toPrecision(5).replace("-", "−") : String(item.score));
      const last = text(item.outcome);
      if (["missed", "false alarm"].includes(item.outcome)) last.classList.add("alarm");
      return make("tr", {}, name, text(item.source), text(item.label), score, last);
    }));
    const first = found.length ? page * PAGE + 1 : 0, end = page * PAGE + part.length;
    count.textContent = `${first.toLocaleString("en")}–${end.toLocaleString("en")} of ${found.length.toLocaleString("en")}`;
    previous.disabled = page === 0;
    next.disabled = end >= found.length;
    for (const [name, cell] of cells) {
      if (name === sorted[0]) cell.setAttribute("aria-sort", sorted[1]);
      else cell.removeAttribute("aria-sort");
    }
  };
  const update = () => {
    const words = search.value.toLowerCase();
    found = rows.filter((item) => (!source.value || item.source === source.value)
      && (!result.value || item.outcome === result.value) && item.image.toLowerCase().includes(words));
    const [name, way] = sorted, sign = way === "ascending" ? 1 : -1;
    found.sort((a, b) => sign * compare(a[name], b[name]) || a.row - b.row);
    page = 0;
    draw();
  };
  const choose = () => {
    rows = rowsOf(data, current());
    for (const [element, name] of [[source, "source"], [result, "outcome"]]) {
      const kept = element.value;
      const names = [...new Set(rows.map((row) => row[name]))].filter(Boolean);
      element.replaceChildren(make("option", { value: "" }, "all"), ...names.map((value) => make("option", { value }, value)));
      element.value = names.includes(kept) ? kept : "";
    }
    resultLabel.hidden = current().threshold === null;
    update();
  };
  const turn = (by) => { page += by; draw(); };
  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  detector.addEventListener("change", choose);
  for (const control of [source, result]) control.addEventListener("change", update);
  search.addEventListener("input", update);
  csv.addEventListener("click", () => {
    const columns = ["image_path", "source", "label", "score", "outcome"];
    const line = (item) => [item.image, item.source, item.label, item.score, item.outcome].map(quoted).join(",");
    const text = [columns.join(","), ...found.map(line)].join("\r\n");
    const address = URL.createObjectURL(new Blob([`${text}\r\n`], { type: "text/csv" }));
    make("a", { href: address, download: `images-${number + 1}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  });
  choose();
};
document.querySelectorAll(".images").forEach(setUp);

// ---- Print: everything that was folded ----
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((details) => { details.open = true; });
});
addEventListener("afterprint", () => folded.forEach((details) => { details.open = false; }));
