"""What to tell whoever lacks a package that one of the extras of `setup.cfg` brings."""


def how_to_install(extra: str) -> str:
    """Returns how to install an extra, in words: there is no package of this name on an index.

    >>> how_to_install("hub")
    "pip install '.[hub]' in twinzoo's checkout, or 'FILE.whl[hub]' with its wheel"
    """
    return f"pip install '.[{extra}]' in twinzoo's checkout, or 'FILE.whl[{extra}]' with its wheel"
