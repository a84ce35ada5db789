// Seconds as a reader wants them. No page is needed here.

/** Such as "0.34 s", "14.2 s" or "125 s". */
export function secondsText(seconds) {
  return `${seconds.toFixed(seconds < 10 ? 2 : seconds < 100 ? 1 : 0)} s`;
}
