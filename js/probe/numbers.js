// Seconds and percent as a reader wants them. No page is needed here.

/** Such as "0.34 s", "14.2 s" or "125 s". */
export function secondsText(seconds) {
  return `${seconds.toFixed(seconds < 10 ? 2 : seconds < 100 ? 1 : 0)} s`;
}

/** Such as "< 0.1", "3.4" or "53". */
export function percentText(part, whole) {
  const percent = (100 * part) / whole;
  return percent < 0.1 ? "< 0.1" : percent.toFixed(percent < 10 ? 1 : 0);
}
