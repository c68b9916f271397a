"""Reading dumps, links and pages. All posts and pages here are invented; expected values are worked by hand."""

from __future__ import annotations

import gzip
from collections import Counter
from html import escape
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from whyrank.errors import InputError
from whyrank.mining.html_text import main_text, plain_text
from whyrank.mining.links import drop_reason, normalise, onsite_post_id
from whyrank.mining.pages import PageStore
from whyrank.mining.stackexchange import Post, licence_of, links_of, read_posts
from whyrank.store import BadLines

HOSTS = ("kites.example.org", "kites.stackexchange.com")


def row(**attributes: str) -> str:
    merged = {"Id": "1", "PostTypeId": "1", "CreationDate": "2019-01-02T03:04:05.678", "Title": "T", "Body": "<p>b</p>"}
    merged.update(attributes)
    written = " ".join(f'{name}="{escape(value)}"' for name, value in merged.items())
    return f"  <row {written} />\r\n"


def dump(folder: Path, *rows: str, head: str = '<?xml version="1.0" encoding="utf-8"?>\r\n') -> Path:
    path = folder / "Posts.xml"
    path.write_bytes(b"\xef\xbb\xbf" + f"{head}<posts>\r\n{''.join(rows)}</posts>".encode())
    return path


def only(posts: list[Post]) -> Post:
    assert len(posts) == 1
    return posts[0]


# --- HTML ---


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("", ""),
        (" <!-- nothing --> ", ""),
        ("<p>one\n  two</p><p>three</p>", "one two\n\nthree"),
        ("<p>AT&T, R & D, &lt;b&gt; &amp;amp; &eacute;</p>", "AT&T, R & D, <b> &amp; é"),
        ("<p>a<b>b</b>c <i>d</i>.</p>", "abc d."),
        ("<p>one<br>two<br/>three</p>", "one\ntwo\nthree"),
        ("<ul><li><p>one</p></li><li></li><li>two</li></ul>", "- one\n\n-\n- two"),
        ("<p>run</p>\n<pre><code>if x:\n\n    y = 1\n</code></pre>\n<p>then</p>", "run\n\nif x:\n\n    y = 1\n\nthen"),
        ("<pre>a <b>b</b>\r\n <i>c</i></pre>", "a b\n c"),
        ("<blockquote><p>he: </p><blockquote><p>she</p></blockquote></blockquote><p>me</p>", "he:\n\nshe\n\nme"),
        ("<table><tr><th>k</th><td>v</td></tr><tr><td>1</td><td>2</td></tr></table>", "k v\n1 2"),
        ("<p>x<script>alert(1)</script><style>p{}</style>y</p>", "xy"),
        ("<?xml version='1.0' encoding='latin-1'?><p>é</p>", "é"),
        ("<p>no end <a href='u'>open", "no end open"),
    ],
)
def test_what_a_reader_sees(html: str, text: str) -> None:
    assert plain_text(html).text == text


@pytest.mark.parametrize("depth", [256, 3000])
def test_deep_nesting_loses_nothing(depth: int) -> None:
    assert (
        plain_text("<blockquote>" * depth + "deep" + "</blockquote>" * depth + "<p>after</p>").text == "deep\n\nafter"
    )


def test_links_keep_their_place() -> None:
    # "See " is 4 characters, "the manual" 10; the image stands where "…manual." ends, at 4 + 10 + 1 = 15.
    body = plain_text('<p>See <a href=" http://a.b/c ">the <i>manual</i></a>.<a href="p.png"><img src="p.png"></a></p>')
    assert [(a.href, a.start, a.end) for a in body.anchors] == [("http://a.b/c", 4, 14), ("p.png", 15, 15)]


@given(st.text(alphabet="<>/=\"'& \nabpreliodv!-", max_size=200))
def test_any_html_is_converted(html: str) -> None:
    body = plain_text(html)
    for start, end in [(anchor.start, anchor.end) for anchor in body.anchors] + list(body.code):
        assert 0 <= start <= end <= len(html)


def test_main_part_of_a_page() -> None:
    page = """<html><head><title> Knots
      for kites </title><style>x</style></head><body><nav>Home Shop</nav><header>Banner</header>
      <main><header><h1>The bowline</h1></header><p>It holds a loop.</p><form>Sign up</form></main>
      <aside>Also read</aside><footer>Imprint</footer></body></html>"""
    assert main_text(page).text == "The bowline\n\nIt holds a loop."
    assert main_text(page).title == "Knots for kites"


def test_a_teaser_is_not_the_main_part() -> None:
    # The article has 6 of more than 24 characters: less than a quarter.
    page = f"<body><article>Teaser</article><div>{'word ' * 20}</div></body>"
    assert main_text(page).text == "Teaser\n\n" + " ".join(["word"] * 20)


# --- dumps ---


def test_questions_and_answers(tmp_path: Path) -> None:
    path = dump(
        tmp_path,
        row(
            Id="7", Title="Why  AT&T?", Score="3", AcceptedAnswerId="9", OwnerUserId="5", Body="<p>a &amp; b &lt; c</p>"
        ),
        row(Id="8", PostTypeId="5"),
        row(Id="9", PostTypeId="2", ParentId="7", Score="-2", OwnerDisplayName="user12", ContentLicense="CC BY-SA 4.0"),
        row(Id="10", PostTypeId="4"),
        row(Id="11", PostTypeId="5"),
    )
    counts: Counter[str] = Counter()
    question, answer = read_posts(path, counts=counts)
    assert question == Post(
        post_id="7",
        is_question=True,
        text="a & b < c",
        title="Why AT&T?",
        links=(),
        score=3,
        parent_id="",
        accepted_id="9",
        author_id="5",
        author_name="",
        created="2019-01-02T03:04:05.678",
        licence="CC BY-SA 4.0",
        is_licence_derived=True,
    )
    assert (answer.post_id, answer.parent_id, answer.score, answer.author_name) == ("9", "7", -2, "user12")
    assert (answer.author_id, answer.title, answer.is_licence_derived) == ("", "", False)
    assert counts == {"posts.question": 1, "posts.answer": 1, "posts.skipped_type_5": 2, "posts.skipped_type_4": 1}


def test_bodies_are_decoded_exactly_once(tmp_path: Path) -> None:
    # In the file: &amp;amp;lt; — XML gives &amp;lt;, HTML gives &lt;. In the link: &amp;amp; -> &amp; -> &.
    body = '<p>write &amp;lt; and <a href="http://a.b/?x=1&amp;y=2">go</a></p>'
    post = only(list(read_posts(dump(tmp_path, row(Body=body)))))
    assert post.text == "write &lt; and go"
    assert post.links[0].href == "http://a.b/?x=1&y=2"


def test_gzip_is_recognised(tmp_path: Path) -> None:
    path = dump(tmp_path, row())
    zipped = tmp_path / "Posts.xml.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_posts(zipped)) == list(read_posts(path))


@pytest.mark.parametrize(
    ("day", "licence"),
    [
        ("2011-04-07T23:59:59.999", "CC BY-SA 2.5"),
        ("2011-04-08T00:00:00.000", "CC BY-SA 3.0"),
        ("2018-05-01T23:59:59.999", "CC BY-SA 3.0"),
        ("2018-05-02T00:00:00.000", "CC BY-SA 4.0"),
    ],
)
def test_licence_by_date(day: str, licence: str) -> None:
    assert licence_of(day) == licence


def test_billion_laughs_are_refused_at_the_door(tmp_path: Path) -> None:
    tenfold = {new: f"&{old};" * 10 for old, new in zip("abcdefgh", "bcdefghi", strict=True)}
    entities = "".join(f'<!ENTITY {name} "{value}">' for name, value in {"a": "ha", **tenfold}.items())
    bomb = f'<?xml version="1.0"?><!DOCTYPE posts [{entities}]>'
    path = tmp_path / "Posts.xml"
    path.write_text(f'{bomb}<posts><row Id="1" PostTypeId="1" Body="&i;" /></posts>')
    with pytest.raises(InputError, match="found a DOCTYPE"):
        list(read_posts(path, bad=BadLines()))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'<posts><row Id="1" PostTypeId="1" Body="R & D" /></posts>', "well-formed XML, found near row 1"),
        (b'<posts><row Id="1" PostTypeId="6" /><row', "well-formed XML, found near row 2"),
        (b"", "well-formed XML"),
        (b"PK\x03\x04", "well-formed XML"),
        (b"<users />", "root element <posts>, found <users>"),
        (b'<posts><row Id="1" Body="&undeclared;" PostTypeId="1" /></posts>', "well-formed XML"),
    ],
)
def test_broken_files_are_errors(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "Posts.xml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        list(read_posts(path, bad=BadLines()))


BAD_ROWS = {
    '<row Id="2" PostTypeId="1" CreationDate="2019-01-01" Title="t" />': r"row 2 \(Id 2\): expected the attribute Body",
    '<row PostTypeId="1" CreationDate="2019-01-01" Title="t" Body="b" />': r"row 2 \(Id missing\): .* attribute Id",
    '<row Id="x" PostTypeId="1" CreationDate="2019-01-01" Title="t" Body="b" />': "expected a number as Id, found 'x'",
    '<row Id="2" CreationDate="2019-01-01" Title="t" Body="b" />': "attribute PostTypeId",
    '<row Id="2" PostTypeId="2" CreationDate="2019-01-01" Body="b" />': "attribute ParentId",
    '<row Id="2" PostTypeId="1" CreationDate="yesterday" Title="t" Body="b" />': "ISO date as CreationDate",
    '<row Id="2" PostTypeId="1" CreationDate="2019-01-01" Title="" Body="b" />': "Title, found an empty one",
}


@pytest.mark.parametrize(("bad_row", "complaint"), BAD_ROWS.items())
def test_bad_rows_are_named_or_counted(tmp_path: Path, bad_row: str, complaint: str) -> None:
    path = dump(tmp_path, row(), bad_row, row(Id="3"))
    with pytest.raises(InputError, match=complaint):
        list(read_posts(path))
    bad, counts = BadLines(), Counter[str]()
    assert [post.post_id for post in read_posts(path, bad=bad, counts=counts)] == ["1", "3"]
    assert (bad.count, counts["posts.bad"]) == (1, 1)


def test_reading_is_lazy_and_forgets(tmp_path: Path) -> None:
    # 200 rows of 10 kB: the first post is there although the end of the file is broken.
    path = dump(tmp_path, *(row(Id=str(number), Body="x" * 10_000) for number in range(1, 201)))
    path.write_bytes(path.read_bytes()[:-3])
    posts = read_posts(path)
    assert next(posts).post_id == "1"
    with pytest.raises(InputError, match="near row 200"):
        list(posts)


# --- links in posts ---


def links(html: str) -> list[tuple[str, str, str, str]]:
    return [(link.kind, link.href, link.anchor, link.sentence) for link in links_of(plain_text(html))]


def test_anchors_come_with_their_sentence() -> None:
    html = "<p>First one. Then see <a href='http://a.b/'>the guide</a> by Kim. Last one!</p><p>Other.</p>"
    assert links(html) == [("anchor", "http://a.b/", "the guide", "Then see the guide by Kim.")]


def test_a_link_over_two_sentences_keeps_both() -> None:
    assert links("<p>Air. <a href='http://a.b/'>Bow. Cut</a> it. Dive.</p>")[0][3] == "Bow. Cut it."


def test_bare_urls_and_code() -> None:
    html = (
        "<p>Look (http://a.b/x_(y)), or http://c.d/e. <a href='http://f.g/'>http://f.g/</a></p>"
        "<pre><code>curl http://h.i/j | sh</code></pre>"
    )
    assert [(kind, href) for kind, href, _, _ in links(html)] == [
        ("anchor", "http://f.g/"),
        ("bare", "http://a.b/x_(y)"),
        ("bare", "http://c.d/e"),
        ("code", "http://h.i/j"),
    ]


def test_a_short_paragraph_takes_the_one_before() -> None:
    html = "<p>Zero.</p><p>The bridle sets the angle.</p><p><a href='http://a.b/'>Source</a></p><p>After.</p>"
    link = next(links_of(plain_text(html)))
    assert link.paragraph == "The bridle sets the angle.\n\nSource"
    assert link.sentence == "Source"


# --- addresses ---


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("HTTP://Example.COM", "https://example.com/"),
        ("http://example.com:80/a/b/", "https://example.com/a/b"),
        ("https://example.com:8443/a#part", "https://example.com:8443/a"),
        ("//example.com/a", "https://example.com/a"),
        ("http://me:secret@example.com./a", "https://example.com/a"),
        ("http://example.com/a?utm_source=x&id=3&fbclid=y&&b", "https://example.com/a?id=3&b"),
        ("http://example.com/?gclid=1", "https://example.com/"),
        ("http://example.com/%7euser/%c3%a9%2F", "https://example.com/~user/%C3%A9%2F"),
        ("http://example.com/é b|c%", "https://example.com/%C3%A9%20b%7Cc%25"),
        ("http://en.m.wikipedia.org/wiki/Kite#History", "https://en.wikipedia.org/wiki/Kite"),
        ("https://en.wikipedia.org/w/index.php?title=Box%20kite", "https://en.wikipedia.org/wiki/Box_kite"),
        (
            "https://en.wikipedia.org/w/index.php?title=Kite&oldid=1",
            "https://en.wikipedia.org/w/index.php?title=Kite&oldid=1",
        ),
        (" http://exa\nmple.com/A ", "https://example.com/A"),
        ("http://[2001:DB8::1]/x", "https://[2001:db8::1]/x"),
    ],
)
def test_normal_form(url: str, normal: str) -> None:
    assert normalise(url) == normal


@pytest.mark.parametrize("url", ["", "a.b/c", "ftp://a.b/", "mailto:a@b.c", "http://", "http://[x/", "http://a.b:x/"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InputError, match="expected an http"):
        normalise(url)


@given(
    st.sampled_from(
        ["http://en.m.wikipedia.org/", "https://a.b", "http://A.b:80", "http://x@a.b:443/w/index.php?title="]
    ),
    st.text(alphabet="/?#%&=:@.[]~ aZ4é;\\+!utm_sw0", max_size=40),
)
def test_normalising_twice_changes_nothing(start: str, rest: str) -> None:
    try:
        normal = normalise(start + rest)
    except InputError:
        return
    assert normalise(normal) == normal


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://en.wikipedia.org/wiki/Kite", None),
        ("https://arxiv.org/pdf/1234.56789.pdf", None),
        ("ftp://a.com/x", "not_http"),
        ("mailto:a@b.com", "not_http"),
        ("javascript:void(0)", "not_http"),
        ("http://[bad", "malformed"),
        ("kite.html", "malformed"),
        ("http://localhost:8080/x", "placeholder"),
        ("http://192.168.0.7/x", "placeholder"),
        ("http://www.example.com/x", "placeholder"),
        ("https://i.stack.imgur.com/Ab1.png", "imgur"),
        ("http://a.com/photo.JPG", "image"),
        ("https://commons.wikimedia.org/w/x.svg?y=1", "image"),
        ("https://en.wikipedia.org/wiki/File:Kite.jpg", "image"),
        ("http://rads.stackoverflow.com/amzn/click/B00", "shop"),
        ("https://www.google.com/search?q=kite", "search_page"),
        ("http://kites.stackexchange.com/users/3/kim", "user_profile"),
        ("/users/3/kim", "user_profile"),
        ("/questions/tagged/knots", "tag_page"),
        ("https://stackoverflow.com/tags", "tag_page"),
        ("https://stackoverflow.com/", "site_chrome"),
        ("https://kites.stackexchange.com/help/on-topic", "site_chrome"),
        ("https://kites.meta.stackexchange.com/questions/3/x", "site_chrome"),
        ("https://stackoverflow.com/questions/12/how", None),
        ("/q/12", None),
    ],
)
def test_links_that_explain_nothing(url: str, reason: str | None) -> None:
    assert drop_reason(url, ("kites.stackexchange.com",)) == reason


@pytest.mark.parametrize(
    ("href", "post_id"),
    [
        ("https://kites.example.org/questions/12/how-to-fly", "12"),
        ("http://KITES.example.org/questions/12", "12"),
        ("/questions/12/how-to-fly/34#34", "34"),
        ("/questions/12/how-to-fly#34", "34"),
        ("/questions/12/how-to-fly/34", "34"),
        ("/questions/12/how-to-fly#comment9_34", "12"),
        ("/q/12/99", "12"),
        ("https://kites.stackexchange.com/a/34/99", "34"),
        ("/a/34", "34"),
        ("https://knots.example.org/q/12", None),
        ("/questions/tagged/knots", None),
        ("/users/12", None),
        ("http://[bad", None),
    ],
)
def test_which_post_a_link_names(href: str, post_id: str | None) -> None:
    assert onsite_post_id(href, HOSTS) == post_id


# --- pages ---


def test_pages_are_found_under_any_spelling(tmp_path: Path) -> None:
    path = tmp_path / "pages.jsonl"
    path.write_text(
        '{"url": "http://en.wikipedia.org/wiki/Kite", "text": " A kite flies. ", "licence": "CC BY-SA 4.0"}\n'
        '{"url": "https://a.com/x/", "html": "<title>X</title><nav>Menu</nav><p>Body &amp; soul</p>"}\n'
        '{"url": "https://A.com/x", "text": "second"}\n'
    )
    store = PageStore.read(path)
    kite, page = store.get("https://en.m.wikipedia.org/wiki/Kite#Tail"), store.get("http://a.com/x?utm_source=z")
    assert kite is not None
    assert (kite.text, kite.licence) == ("A kite flies.", "CC BY-SA 4.0")
    assert page is not None
    assert (page.title, page.text) == ("X", "Body & soul")
    assert store.get("https://a.com/y") is None
    assert store.get("mailto:x") is None
    assert (len(store), store.num_repeated) == (2, 1)


@pytest.mark.parametrize(
    "line",
    [
        '{"url": "http://a.com/"}',
        '{"url": "http://a.com/", "text": "a", "html": "b"}',
        '{"url": "nowhere", "text": "a"}',
        '{"url": "http://a.com/", "text": "a", "lang": "en"}',
    ],
)
def test_bad_pages_are_named_or_counted(tmp_path: Path, line: str) -> None:
    path = tmp_path / "pages.jsonl"
    path.write_text(f'{{"url": "http://b.com/", "text": "good"}}\n{line}\n')
    with pytest.raises(InputError, match=r"pages\.jsonl:2: expected a StoredPage"):
        PageStore.read(path)
    bad = BadLines()
    assert len(PageStore.read(path, bad=bad)) == 1
    assert bad.count == 1


# --- real dumps ---

REAL = [
    # folder, questions, answers, answers with an <a href>, http(s) targets of <a href> in answers: published counts.
    ("ai-2016", 421, 749, 434, 1173),
    ("beer-2017", 663, 1572, 728, 1469),
    ("cardano-2021", 1042, 1496, 736, 1240),
]


@pytest.mark.parametrize(("folder", "num_questions", "num_answers", "num_with_links", "num_links"), REAL)
def test_real_dumps_have_the_known_counts(
    shared_data: Path, folder: str, num_questions: int, num_answers: int, num_with_links: int, num_links: int
) -> None:
    posts = list(read_posts(shared_data / "stackexchange" / folder / "Posts.xml"))
    answers = [post for post in posts if not post.is_question]
    anchors = [[link.href for link in post.links if link.kind == "anchor"] for post in answers]
    assert len(posts) - len(answers) == num_questions
    assert len(answers) == num_answers
    assert sum(bool(hrefs) for hrefs in anchors) == num_with_links
    # ai-2016 has five more that are no addresses: three ftp:, two relative.
    assert sum(href.startswith("http") for hrefs in anchors for href in hrefs) == num_links


def test_attributes_agree_with_a_tree_parser(shared_data: Path) -> None:
    """Titles and hrefs as an independent reading (tree, XPath) finds them."""
    path = shared_data / "stackexchange" / "ai-2016" / "Posts.xml"
    posts = {post.post_id: post for post in read_posts(path)}
    html = etree.HTMLParser(encoding="utf-8")
    for element in etree.parse(path).getroot().iterfind("row"):
        post = posts.get(element.get("Id", ""))
        if post is None:
            continue
        assert post.title == " ".join(element.get("Title", "").split())
        tree = etree.fromstring(f"<div>{element.get('Body', '')}</div>".encode(), html)
        expected = [anchor.get("href", "").strip() for anchor in tree.iter("a") if anchor.get("href") is not None]
        assert [link.href for link in post.links if link.kind == "anchor"] == expected
        words = "".join("".join(str(text) for text in tree.itertext()).split())
        assert "".join(post.text.split()).replace("-", "") == words.replace("-", "")
