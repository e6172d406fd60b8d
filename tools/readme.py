"""The README as package indexes show it: they do not have the files that it links to.

Where the address of the repository is known at the build, `LOPT_REPOSITORY=https://...`, links and
pictures lead there. Where it is not, links become text, and pictures are
left out, so that nothing is broken.
"""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = r"(?!\w+:|#)([^)\s]+)"


def elsewhere(text: str, repository: str = "") -> str:
    """Returns Markdown without relative links: absolute ones, or none."""
    picture, link = rf"!\[([^\]]*)\]\({RELATIVE}\)", rf"(?<!!)\[([^\]]*)\]\({RELATIVE}\)"
    if repository:
        text = re.sub(picture, rf"![\1]({repository}/raw/HEAD/\2)", text)
        return re.sub(link, rf"[\1]({repository}/blob/HEAD/\2)", text)
    return re.sub(link, r"\1", re.sub(rf"{picture}\n+", "", text))


class ReadmeHook(MetadataHookInterface):
    """Gives Hatchling the README."""

    def update(self, metadata: dict) -> None:
        """Sets `readme`."""
        repository = os.environ.get("LOPT_REPOSITORY", "").rstrip("/")
        text = elsewhere(Path(self.root, "README.md").read_text(encoding="utf-8"), repository)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
