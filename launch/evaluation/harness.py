"""lm-evaluation-harness with a further model, a checkpoint of this launcher.

    pip install -e '.[eval]'
    python -m launch.evaluation.harness run --model lasp_tnl \\
        --model_args checkpoint=outputs/quickstart/checkpoint --tasks lambada_openai,hellaswag

All else is the harness's own command line (`lm_eval run --help`). Start it with -m: a folder
launch/ on sys.path would hide the package `evaluate` that some of its tasks import.
"""

import sys

from launch.exit_codes import ConfigError, UserError


def main() -> int:
    """Run the harness's command line; return the exit code."""
    try:
        try:
            from lm_eval.__main__ import cli_evaluate
        except ImportError as error:
            raise ConfigError(
                f"lm-evaluation-harness cannot be imported ({error}): pip install 'lasp[eval]', "
                "or pip install -e '.[eval]' in this repository."
            ) from None
        # Registers the model.
        from launch.evaluation import harness_model  # noqa: F401

        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
