"""Weights of other projects: reading their files without running them, and their names and arithmetic in ours.

pickles.py, torch_files.py, paddle.py, contents.py    bytes -> tensors by the file's own names
names_*.py, translation.py                            those names -> ours, one file a source
accounting.py, architecture.py                        does it all fit a detector, and which one
published.py, download.py, __main__.py                files that projects published: `python -m models.weights`
"""
