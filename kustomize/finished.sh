# For a shell:  source kustomize/finished.sh
#
# finished JOB...: waits until the last of these Jobs is complete, and ends with 1, saying why, as soon as one of them has
# failed. `kubectl wait --for=condition=complete` alone never notices that. Of a conversion name both Jobs, convert and
# finalize: after a failed convert finalize tries on for hours. There is no time limit, for Jobs have one themselves.
finished() {
  local failed
  until kubectl -n models wait --for=condition=complete --timeout=30s "job/${@: -1}" 2>/dev/null; do
    failed=$(kubectl -n models get jobs "$@" -o jsonpath='{..conditions[?(@.type=="Failed")].message}') || return 1
    if [ -n "$failed" ]; then
      echo "$*: $failed" >&2
      return 1
    fi
  done
}
