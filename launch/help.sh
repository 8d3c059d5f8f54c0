# shellcheck shell=bash
# Sourced first by every script. `usage` prints the comment at the head of the script that was started. With
# --help or -h as its first argument, the script prints it and exits before it does anything else.

help_source="$(cd "$(dirname "$0")" && pwd)/$(basename "$0")"
usage() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$help_source"
}

case "${1:-}" in
  --help | -h)
    usage
    exit
    ;;
esac
