"""Everything that knows nothing of the method: processes, files, ranks, compilation.

Variables that libraries read while they are imported are set here, before any of them is.
"""

import getpass
import os
import sys


def prepare_environment():
    """Let no variable of the user's environment break an import."""
    # Figures are drawn without one. A notebook's shell names one that only its kernel has.
    os.environ["MPLBACKEND"] = "agg"
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name; PyTorch names a folder so
        os.environ["USER"] = str(os.getuid())
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if folder:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            print(
                f"warning: TORCHINDUCTOR_CACHE_DIR={folder} cannot be made ({error.strerror}): "
                "compiled networks are kept in PyTorch's own folder",
                file=sys.stderr,
            )
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]


prepare_environment()
