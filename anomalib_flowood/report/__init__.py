# SPDX-License-Identifier: Apache-2.0
"""What a person looks at during and after a benchmark or a test: progress, tables, charts, pages.

Nothing is imported here: a run's folder is read without PyTorch and Lightning.
"""
