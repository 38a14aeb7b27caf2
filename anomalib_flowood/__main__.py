# SPDX-License-Identifier: Apache-2.0
"""``python -m anomalib_flowood`` is ``flowood``."""

from anomalib_flowood.cli import main

if __name__ == "__main__":
    main()
