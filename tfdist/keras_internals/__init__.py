"""Every touch of a private Keras or TensorFlow name, checked on Keras 3.15.1 and TensorFlow 2.21.0.

Nothing outside of this folder may name one. Each function says which private name it leans on;
`tests/unit/test_keras_internals.py` fails when a version changes it.
"""

from tfdist.keras_internals.data import (
    NUM_BATCHES_LOOKED_AT,
    adapt_batches,
    batch_reader,
    batch_spec,
    is_grain_dataset,
    is_torch_loader,
    restore_iterator,
    save_iterator,
    stop_data_server,
)
from tfdist.keras_internals.layers import (
    LayerCall,
    attention_parts,
    find_layers,
    has_mask,
    is_plain,
    keep_mask,
    layer_calls,
    replace_call,
    watching_outputs,
)
from tfdist.keras_internals.losses import (
    LossCorrection,
    compiled_loss,
    has_loss_by_output,
    loss_axis,
    loss_tracker,
)
from tfdist.keras_internals.metrics import (
    asked_metrics,
    flat_metrics,
    flatten_logs,
    has_metrics,
    resets_by_variables,
)
from tfdist.keras_internals.models import (
    all_variables,
    allow_bare_values,
    answering_alone,
    build_model,
    compiled_parts,
    creating_strategy,
    has_own_step,
    is_compiled,
    is_compiled_within,
    known_inputs,
    output_structure,
    seed_states,
    standard_inputs,
    supports_xla,
)
from tfdist.keras_internals.optimizers import (
    ApplyFn,
    ClipsSlices,
    OptimizerView,
    accumulating_with,
    accumulators,
    adam_slots,
    batch_counter,
    decays,
    find_optimizers,
    scaling_rate,
    set_optimizer,
    square_norm,
    trainable_variables_of,
    updating_only,
    updating_with,
)
from tfdist.keras_internals.replica_binding import ReplicaBinding
from tfdist.keras_internals.strategies import (
    DEFAULT_STRATEGY,
    forget_cluster,
    is_available,
    is_deterministic,
    num_ps,
    place_by_bytes,
    reuse_instance_keys,
    wait_at_barrier,
)
from tfdist.keras_internals.variables import (
    count_parameters,
    deferring_variables,
    has_memory,
    is_whole,
    loading_present,
    materialize,
    native,
    own_part,
    refuse_reading,
    saving_in_blocks,
    was_deferred,
    whole_shape,
)

__all__ = [
    "ApplyFn", "ClipsSlices", "DEFAULT_STRATEGY", "LayerCall", "LossCorrection", "NUM_BATCHES_LOOKED_AT",
    "OptimizerView", "ReplicaBinding", "accumulating_with", "accumulators", "adam_slots", "adapt_batches",
    "all_variables", "allow_bare_values", "answering_alone", "asked_metrics", "attention_parts", "batch_counter",
    "batch_reader", "batch_spec", "build_model", "compiled_loss", "compiled_parts", "count_parameters",
    "creating_strategy", "decays", "deferring_variables", "find_layers", "find_optimizers", "flat_metrics",
    "flatten_logs", "forget_cluster", "has_loss_by_output", "has_mask", "has_memory", "has_metrics",
    "has_own_step", "is_available", "is_compiled", "is_compiled_within", "is_deterministic", "is_grain_dataset",
    "is_plain", "is_torch_loader", "is_whole", "keep_mask", "known_inputs", "layer_calls", "loading_present",
    "loss_axis", "loss_tracker", "materialize", "native", "num_ps", "output_structure", "own_part",
    "place_by_bytes", "refuse_reading", "replace_call", "resets_by_variables", "restore_iterator",
    "reuse_instance_keys", "save_iterator", "saving_in_blocks", "scaling_rate", "seed_states", "set_optimizer",
    "square_norm", "standard_inputs", "stop_data_server", "supports_xla", "trainable_variables_of",
    "updating_only", "updating_with", "wait_at_barrier", "was_deferred", "watching_outputs", "whole_shape",
]  # fmt: skip
