"""One thin script a stage of dvc.yaml: read params, do, save, say what came out."""
