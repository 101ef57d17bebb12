"""The demo as a Space: the page of `hyperflow demo` with the models of the Space's owner."""

import os

from hf_hyperflow.demo.app import main

# Spaces put a proxy before the page, which notes the addresses by which visitors are told apart.
os.environ.setdefault("FORWARDED_ALLOW_IPS", "*")
owner = os.environ["SPACE_AUTHOR_NAME"]  # set by Spaces
main(
    adapter=f"{owner}/hyperflow-vit-s14-70",
    backbone=f"{owner}/vit-s14-focus-70",
    host="0.0.0.0",  # noqa: S104 (the container of a Space is reached from outside)
    port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
)
