"""The work of each stage, one file each, all with the signature ``run(project)``; each skips what is finished.

:mod:`training.graph` lists them.
"""
