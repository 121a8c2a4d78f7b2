"""Quality and latency of a live endpoint: `evaluate` sends a data set to a server and scores what comes back.

    data set ─> prompts (text, then token ids) ─> load ─> protocol ─> server
                                                   │
                   results.json, table <─ ROUGE <─ samples

`evaluate.py` is this flow in one screen; every other module is one box of it. The package knows nothing of how a model
was converted: what it needs to know of a model it reads from the server.
"""


def version() -> str:
    """The installed version of ftconvert. Looked up when asked for: importlib.metadata adds a third to `--help`."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("ftconvert")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"
