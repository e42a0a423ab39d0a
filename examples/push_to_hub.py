"""Push a checkpoint folder to the Hub: weights, processor, the code to run it, and a model card.

    python examples/push_to_hub.py runs/shapes-1 ME/detr-shapes
    python examples/push_to_hub.py FOLDER ME/MODEL --private --license apache-2.0 --base_model facebook/detr-resnet-50
    python examples/push_to_hub.py FOLDER ME/MODEL --space ME/MODEL-page --space_examples image.jpg

Log in first (`hf auth login`), or set HF_TOKEN. The card shows the results in FOLDER/metrics.json if they were measured
with exactly these weights, the settings in args.json and the picture validation.png. `--card_only FILE` writes the card
to a file for inspection and pushes nothing. `--space` also makes a Space with the page of app.py; its requirements name
this version of hf_detr on PyPI.
"""

import argparse
from pathlib import Path

from hf_detr.hub import TEMPLATE, model_card_of, prepare_repo, push_folder, push_space
from hf_detr.runtime import exit_on_error, import_extra, prepare_output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of finetune.py, or any DETR checkpoint")
    parser.add_argument("repo_id", help="USER/NAME or NAME")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument("--revision", help="branch to push to; it is created if it does not exist")
    parser.add_argument("--commit_message", metavar="TEXT", help="of the commit; default: Upload DETR")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--max_shard_size", default="50GB", help="largest file of weights, default 50GB")
    parser.add_argument("--license", help="license identifier on the Hub, e.g. apache-2.0")
    parser.add_argument("--base_model", help="Hub id of the model that training started from; default: from args.json")
    parser.add_argument("--datasets", nargs="+", help="Hub ids or names of the training data; default: from args.json")
    parser.add_argument("--template", type=Path, default=TEMPLATE, help="Jinja template of the model card")
    parser.add_argument("--card_only", type=Path, metavar="FILE", help="write the card to this file and push nothing")
    parser.add_argument("--space", metavar="ID", help="also make a Space with the page of app.py, USER/NAME or NAME")
    parser.add_argument("--space_examples", type=Path, nargs="+", default=[], help="images to choose from in the Space")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if not args.folder.is_dir():
        parser.error(f"There is no folder {args.folder}.")
    if not args.template.is_file():
        parser.error(f"There is no template {args.template}.")
    if args.space_examples and not args.space:
        parser.error("--space_examples needs --space.")
    if args.space:
        import_extra("gradio", "app")  # its version is that of the Space
        if args.revision or args.create_pr or args.card_only:
            parser.error("--space uses the model on the main branch; omit --revision, --create_pr and --card_only.")
        if missing := [str(file) for file in args.space_examples if not file.is_file()]:
            parser.error(f"There is no {', '.join(missing)}.")
    about = {name: getattr(args, name) for name in ("license", "base_model", "datasets", "template")}
    if args.card_only:
        if args.card_only.exists():
            parser.error(f"{args.card_only} already exists.")
        prepare_output(args.card_only)
        model_card_of(args.folder, args.repo_id, **about).save(args.card_only)
        print(f"Written to {args.card_only}")
        return
    address = push_folder(
        args.folder,
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        commit_message=args.commit_message,
        create_pr=args.create_pr,
        max_shard_size=args.max_shard_size,
        **about,
    )
    print(f"Pushed: {address}")
    if args.space:
        model_id = prepare_repo(args.repo_id)  # with the name of its owner
        url = push_space(model_id, args.space, examples=args.space_examples, private=args.private or None)
        print(f"Space: {url}")


if __name__ == "__main__":
    with exit_on_error():
        main()
