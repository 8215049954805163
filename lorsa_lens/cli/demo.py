"""`lorsa-lens demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    model: Annotated[
        str | None, typer.Option(help="A folder with a Hugging Face model, or an id on the hub.")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            help="With --model: a text file, or .npy of token ids. Else it writes itself."
        ),
    ] = None,
    layers: Annotated[
        list[int] | None, typer.Option(help="With --model: these layers only. Repeat the option.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the page and the Lorsas.", file_okay=False)
    ] = Path("lorsa_demo"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps for each layer.")] = 700,
    seed: Annotated[int, typer.Option(help="For sampling, initialisation and training.")] = 0,
) -> None:
    """Train Lorsas on every attention layer, splice them in, and name their heads.

    Without options, on the two models of the testbed, whose rules are known.
    """
    from rich.console import Console

    console = Console()
    if model is None and (tokens is not None or layers):
        raise typer.BadParameter("--tokens and --layers need --model")
    if tokens is not None and not tokens.is_file():
        raise typer.BadParameter(f"--tokens: there is no file {tokens}")
    console.print("Loading TransformerLens ...")
    from lorsa_lens.demo.report import print_story, save_page
    from lorsa_lens.demo.story import tell
    from lorsa_lens.demo.subjects import from_model, from_testbed

    if model is None:
        subjects = [from_testbed(name, seed=seed) for name in ("rules", "induction")]
    else:
        try:
            subjects = [from_model(model, tokens_file=tokens, layers=layers or None, seed=seed)]
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    stories = []
    for subject in subjects:
        story = tell(subject, n_steps=steps, seed=seed)
        for lorsa in story.lorsas:
            lorsa.save_pretrained(out / f"{subject.name}_L{lorsa.cfg.layer}")
        print_story(console, story)
        stories.append(story)
    page = save_page(out / "index.html", stories)
    first = subjects[0]
    folder = out / f"{first.name}_L{first.layers[0]}"
    console.print(f"\nThe page: [bold]{page.resolve()}[/bold]\n\nThe same in a notebook:\n")
    console.print(
        f"    {first.load[0]}; from lorsa_lens import Lorsa, splice\n"
        f"    model, lorsa = {first.load[1]}, Lorsa.from_pretrained({str(folder)!r})\n"
        "    with splice(model, lorsa): logits, cache = model.run_with_cache(tokens)\n",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
