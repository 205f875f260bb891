"""Every error a user can cause. The command line prints one as a single line and exits with 2.

A message says what was found, what was expected, where, and what to do next. Anything else that
escapes is a defect of odqa and shows its traceback.
"""


class OdqaError(Exception):
    """Base of all errors that are the input's fault, not the program's."""


class RecipeError(OdqaError):
    """A recipe that does not say what it should; carries all mistakes of the file at once."""


class DataError(OdqaError):
    """An input file or value that cannot be used: missing, damaged, of another format or out of range."""


class ArtifactError(OdqaError):
    """A folder that is not a finished artifact, or one whose files are not those its manifest lists."""


class ArtifactMismatch(ArtifactError):
    """An artifact that is sound but belongs to something else: another encoder, backbone or question set."""


class MissingExtra(OdqaError):
    """An optional dependency that is not installed; names the extra that brings it."""

    def __init__(self, what: str, package: str, extra: str | None) -> None:
        """`extra` is the extra of odqa that brings the package; None: the package belongs to the core."""
        install = f"'odqa[{extra}]'" if extra else package
        super().__init__(f"{what} needs {package}, which is not installed. Install it with: pip install {install}")


class ServerError(OdqaError):
    """A server that cannot be reached, refuses, fails again and again, or speaks another protocol.

    `status`: that of a refusal (400 and so on); None: there was none.
    """

    def __init__(self, what: str, status: int | None = None) -> None:
        super().__init__(what)
        self.status = status
