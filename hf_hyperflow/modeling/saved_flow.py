"""Saving and loading the flow of an adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import torch

from .adapter_files import (
    CONFIG,
    HUB_ARGUMENTS,
    TRAINING_RECORD,
    WEIGHTS,
    open_adapter,
    read_training_record,
    read_weights,
)
from .atomic_file import write_json
from .checksums import MODEL_CHECKSUMS, sha256, write_checksums
from .configuration import HyperFlowConfig
from .flow import Flow
from .images import PROCESSOR, load_processor
from .model_card import adapter_card, write_card
from .pushing import Pushable
from .saving import CheckpointError, atomic_folder
from .tensor_files import list_differences

T = TypeVar("T", bound="SavedFlow")


class SavedFlow(Pushable, Flow):  # type: ignore[misc]  # it pushes otherwise than transformers does
    """A flow that is saved whole or not at all, and of which every file is checked before it is loaded."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write config, weights (safetensors), image processor, training record, code and a model card.

        All of it is written or nothing: whoever loads the adapter at any moment, also after a kill or a power cut, gets
        the old or the new one. A README.md that somebody wrote there is kept. Further arguments are those of
        `PreTrainedModel.save_pretrained`.

        Raises:
            CheckpointError: the folder cannot be written, or another process or thread is writing to it; with
                `push_to_hub=True` also as `push_to_hub`.
        """
        push = kwargs.pop("push_to_hub", False)
        repo_id = kwargs.pop("repo_id", None) or Path(save_directory).name
        push_arguments = {}
        for key in ("private", "token", "revision", "commit_message"):
            if key in kwargs:
                push_arguments[key] = kwargs.pop(key)
        with atomic_folder(save_directory) as draft:
            super().save_pretrained(draft, *args, **kwargs)
            self.config.weights_sha256 = sha256(draft / WEIGHTS)
            self.config.save_pretrained(draft)
            if self.processor is not None:
                self.processor.save_pretrained(draft)
            if self.training_record is not None:
                write_json(draft / TRAINING_RECORD, self.training_record)
            write_checksums(draft, MODEL_CHECKSUMS, save_directory, optional=(PROCESSOR, TRAINING_RECORD))
            write_card(adapter_card(self.config, self.space, self.training_record), draft, save_directory)
        if push:
            self.push_to_hub(repo_id, **push_arguments)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # a name is needed, and further arguments have no order
        cls: type[T], pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> T:
        """Load an adapter from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            args, kwargs: `revision` (a branch, tag or commit), `token`, `cache_dir`, `local_files_only`,
                `force_download`, `subfolder` and the other arguments of `PreTrainedModel.from_pretrained`.

        Raises:
            CheckpointError: there is no adapter, it may not be read, or it is neither within reach nor in the cache;
                or its files are damaged, truncated or incomplete, or they say what no adapter says: every field is
                checked before anything is built from it, and nothing is run or unpickled.
        """
        name = pretrained_model_name_or_path
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        config = kwargs.pop("config", None)
        if not isinstance(config, HyperFlowConfig):
            config = None
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("dtype", torch.float32)
        with open_adapter(name, hub, kwargs.pop("subfolder", ""), config) as (folder, config):
            weights = read_weights(folder / WEIGHTS)
            wrong = list_differences(weights, cls._build_skeleton(config, folder).state_dict())
            if wrong:
                raise CheckpointError(
                    f"{folder / WEIGHTS} does not fit {CONFIG}; missing, unknown or of another shape: "
                    f"{', '.join(wrong[:8])}. Download or copy the folder again."
                )
            # The files are read here. transformers would also follow others in the folder, to base models and kernels.
            loaded: Any = super().from_pretrained(
                None, *args, config=config, state_dict=weights, output_loading_info=True, **kwargs
            )
            model: T = loaded[0]
            model.processor = load_processor(folder)
            model.training_record = read_training_record(folder / TRAINING_RECORD, config, model.space)
        model.config.name_or_path = model.name_or_path = str(name)
        return loaded if wants_info else model

    @classmethod
    def _build_skeleton(cls: type[T], config: HyperFlowConfig, folder: Path) -> T:
        """An adapter without memory for its weights, whatever sizes the config names."""
        try:
            with torch.device("meta"):
                return cls(config)
        except Exception as error:  # the encoder's model may raise anything
            raise CheckpointError(
                f"{folder / CONFIG} describes no adapter that can be built ({type(error).__name__}: {error}). The file "
                "is damaged: download or copy it again."
            ) from error
