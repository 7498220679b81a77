#!/usr/bin/env bash
# Installs the project and its tests into .venv, then lints, checks types and runs pytest.
# Arguments go to pytest: bash tests/run.sh -k order. The last line is pytest's own summary.
# A file of tests stays on one process, and the longest files come first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment test
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

checks=0
ruff check --quiet . || checks=1
ruff format --check --quiet . || { echo "error: ruff format would change files; remedy: run ruff format" >&2; checks=1; }
mypy --no-error-summary || checks=1

tests=0
python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@" || tests=$?
exit $((tests ? tests : checks))
