"""The stages that a recipe's model would be divided into, before anything is started."""

from __future__ import annotations

import math

import keras

from tfdist import keras_internals
from tfdist.config.run_config import RunConfig
from tfdist.data.sources.source import build_source
from tfdist.recipe import load_recipe, parse_overrides
from tfdist.training.pipeline.build import Division, divide
from tfdist.training.pipeline.schedule import idle_share


def describe_stages(config: RunConfig) -> str:
    """Returns a table of the stages of a run under `pipeline`; no weight gets memory.

    Raises:
        ConfigError: If the recipe cannot be loaded, or its model not divided.
    """
    recipe = load_recipe(config.recipe)
    model_kwargs, data_kwargs = parse_overrides(recipe, config.overrides, data_dir=config.data_dir)
    if config.mixed_precision:
        keras.mixed_precision.set_dtype_policy(f"mixed_{config.mixed_precision}")
    with keras_internals.deferring_variables():
        model = recipe.build_model(**model_kwargs)
    batch = build_source(recipe.build_data("train", **data_kwargs)).sample_batch(2)
    layout = config.pipeline_options.layout(config.num_workers)
    num_parts = layout.num_copies * layout.num_micro_batches
    division = divide(
        model,
        batch,
        options=config.pipeline_options,
        layout=layout,
        micro_batch_size=math.ceil(config.global_batch_size / num_parts),
    )
    idle = idle_share(layout.num_stages, layout.num_micro_batches)
    blocks = [text] if (text := division.blocks.describe()) else []
    return "\n".join([*_rows(division), *blocks, f"idle, if all stages take equally long: {idle:.0%}"])


def _rows(division: Division) -> list[str]:
    work = sum(plan.flops for plan in division.plans)
    rows = ["stage  layers                                    weights MB  needs MB  work  kB in an example"]
    for number, plan in enumerate(division.plans, start=1):
        sizes = f"{plan.weight_bytes / 1e6:>10,.1f}  {plan.state_bytes / 1e6:>8,.1f}"
        rows.append(
            f"{number:>5}  {division.name(plan):<40.40}  {sizes}  {plan.flops / work:>4.0%}  "
            f"{plan.bytes_in / 1e3:>16,.1f}"
        )
    return rows
