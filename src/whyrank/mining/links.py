"""Which links are worth following, and when two of them mean the same page.

A normalised URL is a key for looking pages up, not an address to fetch: the scheme is folded to https.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from ipaddress import ip_address
from urllib.parse import SplitResult, urljoin, urlsplit

from whyrank.errors import InputError

__all__ = ["absolute", "drop_reason", "normalise", "onsite_post_id"]

TRACKING = re.compile(
    r"utm_\w+|fbclid|gclid|dclid|msclkid|yclid|igshid|mc_[ce]id|_ga|_gl|ref_src|ref_url|spm|share_id", re.I
)
MOBILE_WIKI = re.compile(r"([a-z-]+)\.m\.((?:wikipedia|wiktionary|wikibooks|wikisource|wikiversity|wikiquote)\.org)")
WIKI = re.compile(r"[a-z-]+\.(?:wikipedia|wiktionary|wikibooks|wikisource|wikiversity|wikiquote)\.org")
NETWORK = re.compile(
    r"(?:.+\.)?(?:stackexchange\.com|stackoverflow\.com|superuser\.com|serverfault\.com|askubuntu\.com|stackapps\.com"
    r"|mathoverflow\.net)"
)
IMAGE_HOST = re.compile(r"(?:.+\.)?imgur\.com|i\.sstatic\.net")
IMAGE_PATH = re.compile(r".*\.(?:png|jpe?g|gif|svg|webp|bmp|ico|tiff?)", re.I)
WIKI_IMAGE = re.compile(r"/wiki/(?:File|Image|Datei|Fichier):.*", re.I)
SEARCH = re.compile(
    r"(?:www|scholar|images)\.google\.[a-z.]+/(?:search|scholar|images)|(?:www\.)?bing\.com/search", re.I
)
SHOP = re.compile(r"rads\.stackoverflow\.com|(?:www\.|smile\.)?amazon\.[a-z.]+|amzn\.(?:to|com)")
PLACEHOLDER = re.compile(r"(?:.+\.)?(?:example\.(?:com|org|net)|localhost|local|test|invalid|example)")
HOSTNAME = re.compile(r"[^\s/?#@\[\]:]+|[0-9a-f:.]+", re.I)
UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}|%|[^A-Za-z0-9\-._~!$&'()*+,;=:@/?]")
ONSITE_POST = re.compile(r"/(?:questions|q|a)/(\d+)(?:/[^/]*(?:/(\d+))?)?/?")
DEFAULT_PORTS = {"http": 80, "https": 443}


def normalise(url: str) -> str:
    """The form under which a page is looked up; `normalise(normalise(url)) == normalise(url)`.

    Scheme folded to https, host in lower case without user, default port or final dot, no fragment, no tracking
    parameters, percent-escapes of RFC 3986, section 6.2.2 (unreserved characters plain, others in capitals), no
    trailing slash but the root's, mobile Wikipedia and its `index.php?title=` folded into the article's address.

    Raises:
        InputError: not an http or https address with a host.
    """
    parts = _split(url)
    host = (parts.hostname or "").lower().rstrip(".")
    mobile = MOBILE_WIKI.fullmatch(host)
    if mobile:
        host = f"{mobile[1]}.{mobile[2]}"
    path, query = _escape(parts.path), _without_tracking(_escape(parts.query))
    if WIKI.fullmatch(host):
        if path == "/w/index.php" and re.fullmatch(r"title=[^&=]+", query):
            path, query = f"/wiki/{query.removeprefix('title=')}", ""
        path = path.replace("%20", "_")
    port = "" if parts.port in (None, DEFAULT_PORTS[parts.scheme], 443) else f":{parts.port}"
    host = f"[{host}]" if ":" in host else host
    return f"https://{host}{port}/{path.strip('/')}" + (f"?{query}" if query else "")


def _split(url: str) -> SplitResult:
    """The parts of an absolute http(s) URL; `//host/…` counts as https."""
    url = re.sub(r"[\t\r\n]", "", url.strip())
    try:
        parts = urlsplit(f"https:{url}" if url.startswith("//") else url)
        is_whole = bool((parts.hostname or "").strip(".")) and (parts.port is None or parts.port > 0)
    except ValueError as cause:
        raise InputError(f"expected an http(s) address, found {url!r}: {cause}") from cause
    if parts.scheme not in DEFAULT_PORTS or not is_whole or not HOSTNAME.fullmatch(parts.hostname or ""):
        raise InputError(f"expected an http(s) address with a host, found {url!r}")
    return parts


def _escape(text: str) -> str:
    def escaped(match: re.Match[str]) -> str:
        found = match[0]
        if len(found) == 3 and found[0] == "%":
            plain = chr(int(found[1:], 16))
            return plain if plain in UNRESERVED else found.upper()
        return "".join(f"%{byte:02X}" for byte in found.encode("utf-8", errors="replace"))

    return ESCAPE.sub(escaped, text)


def _without_tracking(query: str) -> str:
    kept = [part for part in query.split("&") if part and not TRACKING.fullmatch(part.partition("=")[0])]
    return "&".join(kept)


def onsite_post_id(href: str, hosts: Collection[str]) -> str | None:
    """The id of the post that a link to one of `hosts` names, `None` if it names none.

    An answer named in the path or the fragment (`/questions/12/title/34#34`) goes before its question. Relative
    links belong to the first of `hosts`.
    """
    url = absolute(href, hosts)
    try:
        parts = _split(url)
    except InputError:
        return None
    if (parts.hostname or "").lower() not in hosts:
        return None
    match = ONSITE_POST.fullmatch(parts.path)
    if match is None:
        return None
    if parts.path.startswith("/questions/"):
        return parts.fragment if re.fullmatch(r"[0-9]+", parts.fragment) else match[2] or match[1]
    return match[1]


def absolute(href: str, hosts: Collection[str]) -> str:
    """The address of a link written relative to the site's root; any other link as it is."""
    base = next(iter(hosts), None)
    return urljoin(f"https://{base}/", href) if base and href.startswith("/") and not href.startswith("//") else href


def drop_reason(href: str, hosts: Collection[str]) -> str | None:
    """Why a link leads to no page with an explanation, in one word; `None` if it may.

    `hosts` are the names of the dump's own site, the present one first. The words: `not_http`, `malformed`,
    `placeholder`, `image`, `imgur`, `shop`, `search_page`, `user_profile`, `tag_page`, `site_chrome`.
    """
    url = absolute(href, hosts)
    scheme = re.match(r"([a-z][a-z0-9+.-]*):", url.strip(), re.I)
    if scheme and scheme[1].lower() not in DEFAULT_PORTS:
        return "not_http"
    try:
        parts = urlsplit(normalise(url))
    except InputError:
        return "malformed"
    host = parts.hostname or ""
    if PLACEHOLDER.fullmatch(host) or _is_private(host):
        return "placeholder"
    if IMAGE_HOST.fullmatch(host):
        return "imgur"
    if SHOP.fullmatch(host):
        return "shop"
    if SEARCH.match(f"{host}{parts.path}"):
        return "search_page"
    if NETWORK.fullmatch(host) or host in hosts:
        return _network_reason(host, parts.path)
    if IMAGE_PATH.fullmatch(parts.path) or (WIKI.fullmatch(host) and WIKI_IMAGE.fullmatch(parts.path)):
        return "image"
    return None


def _network_reason(host: str, path: str) -> str | None:
    """On the Stack Exchange network only posts (and blog pages) explain something."""
    if re.match(r"/(?:users|u)/", path):
        return "user_profile"
    if re.match(r"/(?:questions/tagged|tags|tag)(?:/|$)", path):
        return "tag_page"
    if ONSITE_POST.fullmatch(path) and not host.startswith(("meta.", "chat.")) and ".meta." not in host:
        return None
    return None if ".blog" in host or "blog." in host else "site_chrome"


def _is_private(host: str) -> bool:
    try:
        return not ip_address(host).is_global
    except ValueError:
        return "." not in host
