// Run by plain node (`node --test tests/web`), and by pytest through test_progress_state.py.

import assert from "node:assert/strict";
import { test } from "node:test";

import { formatBytes, formatDuration, formatNumber } from "../../web/numbers.js";

test("bytes, durations and numbers have three digits", () => {
  const cases = [
    [formatBytes, [[0, "0 B"], [999, "999 B"], [999.6, "1 kB"], [19_234_567, "19.2 MB"], [23.8e9, "23.8 GB"], [5e15, "5000 TB"]]],
    [formatDuration, [[0.44, "0.4 s"], [9.96, "10 s"], [59.7, "1 min 00 s"], [185, "3 min 05 s"], [7620, "2 h 07 min"], [null, "…"]]],
    [formatNumber, [[0.0263412, "0.0263"], [12.345, "12.3"], [1234.5, "1230"], [0, "0"], [0.0000263, "2.63e-05"], [0.00002, "2e-05"], [null, "–"]]],
  ];
  for (const [format, pairs] of cases) {
    for (const [value, text] of pairs) assert.equal(format(value), text);
  }
});
