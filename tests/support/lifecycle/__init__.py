"""What a user does with a Trainer that has an InitCallback: each case runs alone, on DDP and on FSDP2 ranks.

Every case ends by asserting from which weights training started.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.support.lifecycle.averages import average_after, average_before, average_of_all_steps, resumed_average
from tests.support.lifecycle.continuing import (
    fit_after_an_exception,
    fit_after_validating_a_checkpoint,
    fit_after_validating_a_checkpoint_always,
    fit_after_validating_a_file_that_knows_no_callback,
    resume_after_an_exception,
    resume_by_slurm,
    resume_from_a_file_that_knows_no_callback,
    resume_from_a_file_without_callbacks,
    resume_from_a_path,
    resume_from_last,
    resume_with_weights_only,
    second_fit,
    second_fit_in_a_new_trainer,
    second_fit_with_a_checkpoint,
    second_fit_with_a_copied_callback,
    second_fit_with_other_arguments,
    third_fit_after_a_checkpoint,
    validate_and_test_only,
)
from tests.support.lifecycle.finders import (
    batch_size_finder,
    learning_rate_finder_after,
    learning_rate_finder_before,
    resume_with_a_finder,
    second_fit_after_a_finder,
    tuner_lr_find,
    tuner_scale_batch_size,
)
from tests.support.lifecycle.growing import (
    head_missing_in_the_checkpoint,
    new_head_at_the_second_fit,
    parametrized_at_the_second_fit,
    same_network_in_a_new_module,
)
from tests.support.lifecycle.guard import (
    always_initialises_again,
    checkpoint_wins_over_always,
    keep_rules_keep,
    trained_layers_are_kept_beside_a_new_head,
    trained_weights_are_overwritten,
    trained_weights_are_refused,
    weights_only_file_is_refused,
)
from tests.support.lifecycle.setting import Setting
from tests.support.lifecycle.starting import (
    another_module_after_a_checkpoint,
    first_fit,
    fit_after_a_failed_start,
    fit_after_validating_fresh_weights,
    last_without_a_checkpoint,
    second_module,
)

Case = Callable[[Setting], None]

EVERYWHERE: list[Case] = [
    first_fit,
    last_without_a_checkpoint,
    second_module,
    another_module_after_a_checkpoint,
    fit_after_validating_fresh_weights,
    fit_after_a_failed_start,
    resume_from_a_path,
    resume_from_a_file_that_knows_no_callback,
    resume_with_weights_only,
    resume_from_last,
    resume_after_an_exception,
    resume_by_slurm,
    second_fit,
    second_fit_in_a_new_trainer,
    second_fit_with_a_checkpoint,
    third_fit_after_a_checkpoint,
    second_fit_with_a_copied_callback,
    second_fit_with_other_arguments,
    fit_after_validating_a_checkpoint,
    fit_after_validating_a_checkpoint_always,
    fit_after_validating_a_file_that_knows_no_callback,
    fit_after_an_exception,
    validate_and_test_only,
    always_initialises_again,
    checkpoint_wins_over_always,
    trained_weights_are_overwritten,
    trained_layers_are_kept_beside_a_new_head,
    trained_weights_are_refused,
    weights_only_file_is_refused,
    keep_rules_keep,
]
# Lightning's sharded checkpoints lack what restoring after a finder needs: FSDP2 has to save one file.
FINDERS: list[Case] = [
    tuner_lr_find,
    learning_rate_finder_before,
    learning_rate_finder_after,
    second_fit_after_a_finder,
    resume_with_a_finder,
]
# Lightning refuses a WeightAveraging of sharded models, ...
NOT_SHARDED: list[Case] = [
    average_before,
    average_after,
    average_of_all_steps,
    resumed_average,
    resume_from_a_file_without_callbacks,
    new_head_at_the_second_fit,  # and a sharded model does not take a whole head
    same_network_in_a_new_module,
    head_missing_in_the_checkpoint,
    parametrized_at_the_second_fit,
]
# ... and batch size finders on several devices.
ONE_DEVICE: list[Case] = [tuner_scale_batch_size, batch_size_finder]

# The memory of a model made on meta comes late: what is in it is neither fresh nor trained.
ON_META: list[Case] = [
    first_fit,
    second_fit,
    second_fit_in_a_new_trainer,
    resume_from_a_path,
    fit_after_validating_a_checkpoint,
    trained_weights_are_refused,
    weights_only_file_is_refused,
]

# What Lightning says about some of these cases, whatever the callbacks are.
EXPECTED_WARNINGS = [
    r"ignore:.*ckpt_path=.last.*is set, but there is no last checkpoint available:UserWarning",
    r"ignore:Detected an existing checkpoint in:UserWarning",  # torch, of a sharded last.ckpt
    r"ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning",
    r"ignore:.*ckpt_path=None.*was called without a model:UserWarning",
]
