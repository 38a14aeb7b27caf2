# SPDX-License-Identifier: Apache-2.0
"""The server's addresses: what they answer, what they refuse and in which words, what they never open."""

import base64
import io
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

import anomalib_flowood
from anomalib_flowood.inference import Detector
from anomalib_flowood.models.components.export_check import Runtime
from anomalib_flowood.serving import Limits, check_installed
from anomalib_flowood.serving.app import create_app
from anomalib_flowood.serving.scorer import Scorer

CALIBRATION = list(np.linspace(0.1, 0.4, 20))


class Mean:
    """A runtime whose score is the mean of the image, and whose map is its red channel."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.entered = False

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.entered = True
        assert self.go.wait(20)
        self.batches.append(len(images))
        score = images.mean((1, 2, 3))
        if np.any((score > 0.19) & (score < 0.21)):
            msg = "An image has no score."
            raise ValueError(msg)
        if np.any((score > 0.29) & (score < 0.31)):
            msg = "secret of the runtime"
            raise RuntimeError(msg)
        return {"pred_score": score, "raw_score": np.where(score == 1, np.inf, score), "anomaly_map": images[:, 0]}


def new_client(runtime=None, calibration=CALIBRATION, **limits) -> TestClient:
    detector = Detector(Runtime(runtime or Mean()), (8, 8), calibration, 1 / 21 if calibration else None)
    return TestClient(create_app(detector, Limits(**limits), drift_images=20), raise_server_exceptions=False)


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def client():
    with new_client() as client:
        yield client


def png(grey: int, size=(12, 10), kind="PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(content, kind)
    return content.getvalue()


def files(*contents: bytes, field="file"):
    return [(field, (f"{number}.png", content)) for number, content in enumerate(contents)]


def test_one_image_is_the_body(client):
    answer = client.post("/score", content=png(250))
    assert answer.status_code == 200
    (image,) = answer.json()["images"]
    assert image == {
        "file": "", "score": pytest.approx(250 / 255), "raw_score": pytest.approx(250 / 255), "p_value": 1 / 21,
        "label": "anomalous", "anomaly_map": None,
    }  # fmt: skip
    for kind in ("JPEG", "TIFF", "BMP", "WEBP", "PPM"):  # whatever it is said to be: curl names a form
        content = png(100, kind=kind)
        answer = client.post("/score", content=content, headers={"content-type": "application/x-www-form-urlencoded"})
        assert answer.json()["images"][0]["label"] == "normal", kind


def test_several_images_are_files_of_a_form(client):
    answer = client.post("/score?maps=true", files=[*files(png(20), png(250)), ("other", ("c d.png", png(30)))])
    images = answer.json()["images"]
    assert [image["file"] for image in images] == ["0.png", "1.png", "c d.png"]
    assert [image["label"] for image in images] == ["normal", "anomalous", "normal"]
    with Image.open(io.BytesIO(base64.b64decode(images[1]["anomaly_map"]))) as drawn:
        assert (drawn.format, drawn.mode, drawn.size) == ("PNG", "L", (8, 8))
        assert np.array(drawn).min() == np.array(drawn).max() == 250


def test_of_large_photographs_two_are_in_memory():
    """Of a detector with tiles, one in each request: one that is scored, and one that waits for it."""
    runtime, read = Mean(), []
    detector = Detector(Runtime(runtime, (1, 3, None, None), takes_bytes=True), (8, 8), CALIBRATION, 1 / 21)
    plain = detector.read
    detector.read = lambda content: (read.append(len(runtime.batches)), plain(content))[1]
    with TestClient(create_app(detector, Limits(), drift_images=20)) as client, ThreadPoolExecutor(6) as pool:
        runtime.go.clear()
        answers = [pool.submit(client.post, "/score?maps=true", content=png(grey)) for grey in (10, 20, 30, 40, 60, 70)]
        until(lambda: runtime.entered and len(read) == 2)
        time.sleep(0.1)
        assert read == [0, 0]
        runtime.go.set()
        assert sorted(answer.result().json()["images"][0]["raw_score"] for answer in answers) == [
            pytest.approx(grey / 255) for grey in (10, 20, 30, 40, 60, 70)
        ]
        # Before the n-th is read, all but one of those before it have been scored.
        assert all(scored >= place - 1 for place, scored in enumerate(read))
        several = client.post("/score", files=files(png(250), png(1)))
        assert several.status_code == 413
        assert "2 files where 1 is expected" in several.json()["detail"]


def test_a_map_is_a_picture(client):
    answer = client.post("/map", content=png(250))
    assert answer.headers["content-type"] == "image/png"
    assert np.array(Image.open(io.BytesIO(answer.content))).max() == 250
    assert client.post("/map", files=files(png(250))).content == answer.content
    several = client.post("/map", files=files(png(250), png(1)))
    assert several.status_code == 413
    assert "2 files where 1 is expected" in several.json()["detail"]


def test_detectors_without_maps_or_calibration():
    def score(images):
        return {"pred_score": images.mean((1, 2, 3)) - np.inf}

    with new_client(score, calibration=()) as client:
        (image,) = client.post("/score?maps=true", content=png(100)).json()["images"]
        assert image == dict.fromkeys(image, None) | {"file": ""}  # JSON has no infinity
        none = client.post("/map", content=png(100))
        assert (none.status_code, "draws no map" in none.json()["detail"]) == (404, True)
        assert client.get("/drift").json() == {"p_value": None, "images": 2}
        assert "flowood_drift_p_value NaN" in client.get("/metrics").text


def test_a_score_that_is_no_number_is_said():
    with new_client(lambda images: {"pred_score": np.full(len(images), np.nan)}, calibration=()) as client:
        answer = client.post("/score", content=png(100))
    assert (answer.status_code, "NaN" in answer.json()["detail"]) == (422, True)


@pytest.mark.parametrize(
    ("given", "status", "says"),
    [
        ({"content": b""}, 400, "The body is empty. Send the bytes of an image"),
        ({"content": b"no image"}, 422, "it is none of BMP, JPEG, PNG"),
        ({"content": b"/etc/passwd"}, 422, "it is none of"),
        ({"content": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, 422, "it is none of"),
        ({"content": png(9)[:45]}, 422, "Cannot read the image"),
        ({"json": {"path": "/etc/passwd"}}, 422, "it is none of"),
        ({"content": png(9, (3000, 2000))}, 413, "3000 × 2000 pixels, and up to 5 million"),
        ({"content": bytes(2**20 + 1)}, 413, "larger than 1 MiB"),
        ({"content": (bytes(2**16) for _ in range(17))}, 413, "larger than 1 MiB"),  # nobody says how long it is
        ({"files": files(*[png(9)] * 5)}, 413, "Maximum number of files is 4. Send fewer"),
        ({"files": files(png(9), b"broken", png(9))}, 422, "1.png: Cannot read"),
        ({"files": files(png(9), b"")}, 422, "1.png: It is empty"),
        ({"data": {"file": "/etc/passwd"}, "files": files(png(9))}, 422, "file: It is text, and no file."),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400, "Missing boundary"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, "multipart/form-data"),
        ({"content": png(51)}, 422, "An image has no score."),
        ({"content": png(76)}, 500, "its log says more"),
        ({"content": png(9), "params": {"maps": "perhaps"}}, 422, "maps: "),
    ],
)
def test_what_is_refused(given, status, says):
    with new_client(max_mib=1, max_megapixels=5, max_files=4) as client:
        answer = client.post("/score", **given)
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert says in problem["detail"]
        assert problem["status"] == status
        for secret in ("Traceback", "0x", ".py", "secret"):
            assert secret not in answer.text
        assert f'flowood_requests_total{{path="/score",status="{status}"}} 1.0' in client.get("/metrics").text
        assert client.post("/score", content=png(20)).status_code == 200  # it goes on
        assert client.app.state.service._waiting == 0


def test_each_file_that_cannot_be_read_is_named(client):
    answer = client.post("/score", files=files(b"broken", png(20), b"/etc/passwd"))
    assert [(error["file"], error["index"]) for error in answer.json()["errors"]] == [("0.png", 0), ("2.png", 2)]
    assert "No image of this request was scored" in answer.json()["detail"]
    assert client.get("/drift").json()["images"] == 0


def test_unknown_addresses_and_methods_are_problems_too(client):
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/score", 405), ("POST", "/../etc/passwd", 404)):
        answer = client.request(method, path)
        assert (answer.status_code, answer.json()["status"]) == (status, status)
    assert 'path="other",status="404"' in client.get("/metrics").text


def test_no_path_is_opened_from_a_request(client, tmp_path):
    existing = tmp_path / "secret.png"
    existing.write_bytes(png(250))
    path, opened = str(existing), []
    listening = True

    def listen(event: str, arguments: tuple) -> None:
        if listening and event in {"open", "os.listdir", "os.scandir"}:
            opened.append(str(arguments[0]))

    client.post("/score", files=files(png(20)))  # imports what it needs
    sys.addaudithook(listen)  # stays for the process's life
    for given in (
        {"content": path.encode()},
        {"json": {"file": path, "path": path, "url": f"file://{path}"}},
        {"params": {"file": path, "path": path}, "content": b"x"},
        {"data": {"file": path}, "files": files(png(20), field=path)},
        {"files": [("file", (path, png(20)))]},
        {"files": [("file", (f"../../..{path}", path.encode()))]},
        {"headers": {"content-type": path, "content-location": path, "x-sendfile": path}, "content": png(20)},
    ):
        client.post("/score", **given)
        client.post("/map", **given)
    listening = False
    assert not [name for name in opened if "secret" in name or str(tmp_path) in name]
    assert opened == []  # larger files stay in memory, too


def test_large_files_of_a_form_stay_in_memory(client):
    opened = []
    listening = True
    sys.addaudithook(lambda event, arguments: opened.append(arguments[0]) if listening and event == "open" else None)
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "PNG")
    assert len(content.getvalue()) > 2**21
    assert client.post("/score", files=files(content.getvalue())).status_code == 200
    listening = False
    assert opened == []


def test_a_full_queue_refuses_before_the_body_is_read():
    runtime = Mean()
    with new_client(runtime, queue=3, max_files=3) as client, ThreadPoolExecutor(4) as pool:
        runtime.go.clear()
        first = pool.submit(client.post, "/score", files=files(png(20), png(21)))
        until(lambda: client.app.state.service._waiting == 2)
        two = client.post("/score", files=files(png(20), png(20)))  # one place is left
        assert two.status_code == 503
        third = pool.submit(client.post, "/score", content=png(20))
        until(lambda: client.app.state.service._waiting == 3)
        sent = []

        def body():
            sent.append(1)
            yield png(20)

        refused = client.post("/score", content=body())
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert "3 images wait" in refused.json()["detail"]
        assert "flowood_waiting_images 3.0" in client.get("/metrics").text
        assert client.get("/health").status_code == 200
        runtime.go.set()
        assert (first.result().status_code, third.result().status_code) == (200, 200)
        assert client.post("/score", content=png(20)).status_code == 200


def test_what_waits_together_is_scored_together_and_fails_alone():
    runtime = Mean()
    with new_client(runtime) as client, ThreadPoolExecutor(12) as pool:
        runtime.go.clear()
        asked = [pool.submit(client.post, "/score", content=png(20))]
        until(lambda: runtime.entered)  # the thread has the first
        greys = [10, 51, 250, 76, 20, 20, 20, 20]  # 51 has no score, and with 76 the runtime fails
        asked += [pool.submit(client.post, "/score", content=png(grey)) for grey in greys]
        until(lambda: client.app.state.service.scorer._queue.qsize() == len(greys))
        runtime.go.set()
        statuses = [one.result().status_code for one in asked]
    assert statuses == [200, 200, 422, 200, 500, 200, 200, 200, 200]
    assert runtime.batches[:2] == [1, 8]
    assert client.app.state.service.scorer.drift()[0] == 7


def test_the_body_and_the_answer_have_their_time():
    runtime = Mean()
    with new_client(runtime, upload_timeout=0.2, answer_timeout=0.2) as client:
        runtime.go.clear()
        slow = client.post("/score", content=png(20))
        assert (slow.status_code, "within 0.2 s" in slow.json()["detail"]) == (504, True)
        runtime.go.set()
        assert client.post("/score", content=png(20)).status_code == 200
        assert client.app.state.service._waiting == 0


def test_what_waits_is_scored_at_the_end():
    scorer = Scorer(Detector(Runtime(Mean()), (8, 8), CALIBRATION, 1 / 21), window=5)
    answers = [scorer.submit(image) for image in scorer.detector.read([png(20)] * 70)]
    answers[3].cancel()
    scorer.start()
    scorer.stop()
    assert [answer.done() for answer in answers] == [True] * 70
    assert answers[-1].result().label.tolist() == [False]
    assert not scorer.alive


def test_drift_and_metrics(client):
    assert client.get("/drift").json() == {"p_value": None, "images": 0}
    for _ in range(7):
        client.post("/score", files=files(*[png(254)] * 3))
    drift = client.get("/drift").json()
    assert drift["images"] == 20
    detector = client.app.state.service.detector
    assert drift["p_value"] == detector.drift_p_value(np.full(20, 254 / 255)) < 1e-9
    text = client.get("/metrics").text
    assert 'flowood_images_total{label="anomalous"} 21.0' in text
    assert 'flowood_requests_total{path="/score",status="200"} 7.0' in text
    assert 'flowood_request_seconds_bucket{le="+Inf",path="/score"} 7.0' in text
    assert f"flowood_drift_p_value {drift['p_value']}" in text
    with new_client() as other:  # a registry of its own
        assert "flowood_images_total{" not in other.get("/metrics").text


def test_health(client):
    for path in ("/health", "/health/live", "/health/ready"):
        assert client.get(path).status_code == 200
    client.app.state.service.scorer.stop()
    assert client.get("/health/ready").status_code == 503
    assert client.get("/health/live").status_code == 200


def test_health_without_a_body(client):
    for path in ("/health", "/health/live", "/health/ready"):
        assert client.head(path).status_code == 200
    client.app.state.service.scorer.stop()
    assert client.head("/health").status_code == 503


def test_the_description_names_every_address(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/score", "/map", "/drift", "/metrics", "/health", "/health/live", "/health/ready"}
    assert set(paths["/score"]["post"]["requestBody"]["content"]) == {"image/*", "multipart/form-data"}


def test_the_page_fetches_nothing_from_elsewhere(client):
    page = client.get("/").text
    assert "<h1>Normal or anomalous?</h1>" in page
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    assert "up to 32 MiB and 50 million pixels" in page


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_mib": 0}, "max_mib must be positive"),
        ({"answer_timeout": float("nan")}, "answer_timeout must be positive"),
        ({"queue": 8}, "max_files=32 exceeds queue=8"),
    ],
)
def test_limits_that_make_no_sense(given, says):
    with pytest.raises(ValueError, match=says):
        Limits(**given)


def test_without_the_extra_one_hears_how_to_install_it(monkeypatch):
    monkeypatch.setattr("anomalib_flowood.serving.find_spec", lambda name: None if name == "uvicorn" else True)
    with pytest.raises(ModuleNotFoundError, match=r"needs uvicorn: pip install 'anomalib-flowood\[serve\]'"):
        check_installed()


def test_a_served_detector_says_what_the_loaded_one_says(cases):
    checkpoint = cases("feature_map_flow").checkpoint
    contents = []
    for image in np.random.default_rng(0).integers(0, 256, (5, 60, 41, 3), dtype=np.uint8):
        contents.append(io.BytesIO())
        Image.fromarray(image).save(contents[-1], "PNG")
    contents = [content.getvalue() for content in contents]
    expected = anomalib_flowood.load(checkpoint).score(contents)
    with TestClient(create_app(anomalib_flowood.load(checkpoint))) as client:
        images = client.post("/score?maps=true", files=files(*contents)).json()["images"]
    for name in ("raw_score", "score", "p_value"):
        np.testing.assert_allclose([image[name] for image in images], getattr(expected, name), rtol=1e-4, atol=1e-6)
    assert [image["label"] == "anomalous" for image in images] == expected.label.tolist()
    drawn = Image.open(io.BytesIO(base64.b64decode(images[2]["anomaly_map"])))
    np.testing.assert_allclose(np.array(drawn) / 255, expected.anomaly_map[2], atol=0.51 / 255)
