# SPDX-License-Identifier: Apache-2.0
from hypothesis import settings

# Two shared cores: a deadline would measure the neighbours.
settings.register_profile("flows", deadline=None, max_examples=30)
settings.load_profile("flows")
