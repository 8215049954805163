"""The whole suite on every generation of TransformerLens, Python and torch: `make test-matrix`.

The pins are sets that install and import together; see docs/hosts.md. An interpreter that is not
there is left out, and said so. Only some tests: `nox -- tests/test_splice.py`; one environment:
`nox -s "suite(2.18)"`.
"""

import nox

nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False

TESTS = ["pytest>=8", "pytest-xdist", "hypothesis", "httpx2"]
OLD = ["numpy<2", "pyarrow<26", "datasets>=4", "transformers<5"]
MATRIX = {
    ("3.10", "2.16"): [
        "torch==2.6.0", "transformer-lens==2.16.1", "transformers>=4.51", *OLD
    ],
    ("3.11", "2.18"): [
        "torch==2.13.0", "transformer-lens==2.18.0", "transformers>=4.57", *OLD
    ],
    ("3.12", "3.9"): ["torch==2.13.0", "transformer-lens==3.9.0", "sae-lens>=6.54,<7"],
    ("3.13", "4.3"): ["torch==2.13.0", "transformer-lens==4.3.0"],
}  # fmt: skip


@nox.session
@nox.parametrize("python,transformer_lens", list(MATRIX), ids=[name for _, name in MATRIX])
def suite(session: nox.Session, transformer_lens: str) -> None:
    """All tests on one generation of TransformerLens."""
    assert isinstance(session.python, str)
    pins = MATRIX[session.python, transformer_lens]
    session.install(*TESTS, *pins, ".[analysis,datasets,serve]")
    session.run(
        "python", "-m", "pytest", "-n", "2", *session.posargs,
        env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
