"""Which loss a classification head uses."""

from modelspec.configs import ModelConfig


def resolve_problem_type(config: ModelConfig, labels_are_integers: bool) -> str:
    """Returns the problem type; the first call with labels decides it and writes it into the config, where it stays.

    One label is a regression; else integer labels are `"single_label_classification"` and floating-point labels
    `"multi_label_classification"`. The reference decides and keeps it the same way.
    """
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels_are_integers:
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"
    return config.problem_type
