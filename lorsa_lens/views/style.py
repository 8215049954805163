"""The style sheet of a page.

Figures assume a light background, so their cards stay light in the dark scheme. The rules for
headings in cards make circuitsvis' labels fit; the last rule for cards widens its thumbnails,
which are a twelfth of the figure otherwise.
"""

POSITIVE = "#0072b2"
"""Blue. With `NEGATIVE`, a pair that colour-blind readers tell apart (Okabe and Ito)."""

NEGATIVE = "#d55e00"
"""Orange."""

STYLE = """
:root { color-scheme: light dark; --text: #1c1c1c; --soft: #5c5c5c; --line: #d9d9d9;
  --page: #fcfcfc; --band: #f1f1f1; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --soft: #a6a6a6; --line: #3c3c3c; --page: #171717; --band: #232323; }
}
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 52rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1, h2, h3, figcaption, q { overflow-wrap: anywhere; }
main > h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1.5rem; }
main > h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
main > h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
main > p { max-width: 42rem; margin: .75rem 0; overflow-wrap: anywhere; white-space: pre-line; }
main > figure { margin: 1.25rem 0 2rem; }
main > figure > figcaption { margin-top: .5rem; font-size: .85rem; color: var(--soft); }
.card { background: #fff; color: #1c1c1c; color-scheme: light; border: 1px solid var(--line);
  border-radius: 6px; padding: 1rem; overflow-wrap: anywhere; }
.card h2, .card h3, .card h4 { font-weight: 600; line-height: 1.3; }
.card h2 { font-size: .95rem; }
.card h3 { font-size: .9rem; margin-top: 0; }
.card h4 { font-size: .65rem; }
.card h2, .card h4 { text-shadow: 0 0 2px #000a; }
.card > div > div > h3 + div > div { flex: 0 0 6rem !important; max-width: 6rem !important; }
.table { overflow-x: auto; margin: 1rem 0 1.5rem; }
.table table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
.table th, .table td { padding: .35rem .75rem; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; }
.table th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.table .number { text-align: right; white-space: nowrap; }
.card h4 + div { cursor: pointer; }
.card [role="button"]:focus-visible { outline: 2px solid #1c1c1c; outline-offset: 1px; }
.table tbody tr:hover { background: var(--band); }
.table th button { all: unset; cursor: pointer; }
.table th button:focus-visible { outline: 2px solid; outline-offset: 2px; }
.table th[aria-sort="ascending"] button::after { content: " ▲"; }
.table th[aria-sort="descending"] button::after { content: " ▼"; }
a { color: light-dark(#0b57a4, #8ab8ff); }
nav, form { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin: 1rem 0; }
input, select, button, textarea { font: inherit; max-width: 100%; }
button { border: 1px solid var(--line); border-radius: 4px; background: var(--band);
  color: inherit; padding: .1rem .6rem; cursor: pointer; }
button:disabled { color: var(--soft); cursor: default; }
main:has(#heads) { max-width: 90rem; }
#heads td { white-space: nowrap; max-width: 18rem; overflow: hidden; text-overflow: ellipsis; }
details p { overflow-wrap: anywhere; }
"""
