// The colours of memory: the parts from the bottom of a stack up, and those of a dark theme.
// nodes/probe/chart.py reads them from this file, as JSON: what follows `export default` is JSON.
export default {
  "parts": { "other": "#8d93a1", "weights": "#4c86e0", "activations": "#f0a030" },
  "alarm": "#e5484d",
  "ground": "#222222",
  "ink": "#dddddd"
};
