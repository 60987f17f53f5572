"""The stages, one file each, all with the signature ``run(project)``; each skips what is finished."""
