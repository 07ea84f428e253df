"""EasyDistill's contract: writing its configs, running its trainer or ours."""
