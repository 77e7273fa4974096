"""How numbers of things read, the same wherever they are told. Pure."""


def counted(number: int, what: str) -> str:
    """
    >>> counted(1, "cell"), counted(3, "launch"), counted(0, "note")
    ('1 cell', '3 launches', 'no notes')
    """
    return f"{number or 'no'} {what}" + ("" if number == 1 else "es" if what.endswith("ch") else "s")
