"""What gemmnet raises. The text says what came, what was expected, and what to do."""


class Error(Exception):
    """Something went wrong; the base of all others."""


class ShapeError(Error, ValueError):
    """An array does not have the shape that the operation needs."""


class InvalidError(Error, ValueError):
    """An argument has a value that makes no sense."""


class DataError(Error, ValueError):
    """A file, or the bytes of one, is not what it should be."""


class FileError(Error, OSError):
    """The operating system refused to read or write a file: `errno` and `filename` are as in every OSError."""

    def __str__(self) -> str:
        return str(self.strerror)


class MissingFileError(FileError, FileNotFoundError):
    """There is no such file or folder."""


class DivergedError(Error, ArithmeticError):
    """Training produced a loss that is not a number."""


class PanicError(Error, RuntimeError):
    """No memory left, or a bug in gemmnet: the text says which."""
