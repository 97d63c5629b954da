/** One style of numbers in all panels, as quant_core/display.py has it in reports: 3 significant digits, decimal units. */

const UNITS = ["B", "kB", "MB", "GB", "TB"];

/** 0.0263, 12.3, 1230, 2.63e-05; "–" for a value that is none. */
export function formatNumber(value) {
  if (!Number.isFinite(value)) return "–";
  if (value && Math.abs(value) < 1e-4) return value.toExponential(2).replace(/\.?0*e/, "e").replace(/e-(\d)$/, "e-0$1");
  return String(Number(value.toPrecision(3)));
}

/** Decimal units: 19.2 MB. */
export function formatBytes(count) {
  let power = 0;
  while (count >= 999.5 && power < UNITS.length - 1) {
    count /= 1000;
    power += 1;
  }
  return `${Number(count.toPrecision(3))} ${UNITS[power]}`;
}

/** 0.4 s, 42 s, 3 min 05 s, 2 h 07 min. */
export function formatDuration(seconds) {
  if (!Number.isFinite(seconds)) return "…";
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const two = (number) => String(number).padStart(2, "0");
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
}

/** An error relative to that of round to nearest: 0.52×. */
export const formatGain = (gain) => `${formatNumber(gain)}×`;

/** The smallest and the largest of values: 0.02–0.03. */
export function formatRange(values, format = formatNumber) {
  const [low, high] = [Math.min(...values), Math.max(...values)].map((value) => format(value));
  return low === high ? low : `${low}–${high}`;
}
