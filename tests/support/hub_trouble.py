"""What goes wrong at a loopback hub, and on the way to it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Trouble:
    """What goes wrong. Counters say for how many requests; -1 means always."""

    status: int = 0
    """Answer with this status instead (for instance 429 or 500) ``status_times`` times."""
    status_times: int = -1
    retry_after: int | None = None
    cut_after: int | None = None
    """Close the connection after so many bytes of a body, ``cut_times`` times."""
    cut_times: int = -1
    ranges: bool = True
    """Honour Range; a server that does not makes every broken download start over."""
    bytes_per_second: float = 0.0
    silence: float = 0.0
    """Seconds to wait before each answer."""
    html: bool = False
    """Send a web page for everything, as a captive portal does."""
    html_files: bool = False
    """Send a web page for files only, with the headers of the true file on HEAD."""
    gone: set[str] = field(default_factory=set)
    """Files that are listed but answer 404."""
    listing_bytes_per_second: float = 0.0
    """How fast answers of the API come."""
    packed_listing: bytes | None = None
    """Answer every question of the API with this, and say that it is gzip."""
    bare_404: bool = False
    """404 without the header that says what is missing."""
    status_for: str = ""
    """``status`` only for requests (``GET /path``) that hold this."""
    head_length: int | None = None
    """The length of files to tell on HEAD, whatever the listing says."""
    get_length: int | None = None
    """The Content-Length of files to send on GET, whatever HEAD said."""
    redirect: str = ""
    """Send whoever wants a file to the same path at this address, as hubs do with their storage."""
    answer: bytes | None = None
    """What every listing and search is answered with, whatever was asked."""
    etag: str = ""
    """The etag of every file, whatever it holds."""
    next_page: str = ""
    """What every search names as its next page."""
    cut_uploads: int = 0
    """So many uploads are cut in the middle."""
    upload_bytes_per_second: float = 0.0
    lose_answers_of: str = ""
    """Requests whose path holds this are done, and the connection is closed instead of answered, ``lose_answers`` times."""
    lose_answers: int = 1
    altered: bool = False
    """Send files of the right length with another content, as a broken cache on the way does."""
