"""The whole suite on every generation of TransformerLens: `make test-matrix`.

The pins are sets that install and import together; see docs/hosts.md. Only some tests:
`nox -- tests/test_splice.py`; another interpreter: `nox --force-python 3.12`.
"""

import nox

nox.options.reuse_existing_virtualenvs = True

CORE = ["torch==2.13.0", "pytest>=8", "pytest-xdist", "hypothesis"]
OLD = ["numpy<2", "pyarrow<26", "datasets>=4", "transformers<5"]
MATRIX = {
    "2.16": ["transformer-lens==2.16.1", "transformers>=4.51", *OLD],
    "2.18": ["transformer-lens==2.18.0", "transformers>=4.57", *OLD],
    "3.9": ["transformer-lens==3.9.0", "sae-lens>=6.54,<7"],
    "4.3": ["transformer-lens==4.3.0"],
}


@nox.session
@nox.parametrize("transformer_lens", list(MATRIX), ids=list(MATRIX))
def suite(session: nox.Session, transformer_lens: str) -> None:
    """All tests on one generation of TransformerLens."""
    session.install(*CORE, *MATRIX[transformer_lens], ".[analysis,datasets]")
    session.run(
        "python", "-m", "pytest", "-n", "2", *session.posargs,
        env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
