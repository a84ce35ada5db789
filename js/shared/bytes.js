// Bytes as a reader wants them. No page is needed here.

const UNITS = [
  { name: "GiB", bytes: 2 ** 30 },
  { name: "MiB", bytes: 2 ** 20 },
  { name: "KiB", bytes: 2 ** 10 },
  { name: "B", bytes: 1 },
];

/** The largest unit of which there is at least one. */
export function unitOf(bytes) {
  return UNITS.find((unit) => Math.abs(bytes) >= unit.bytes) ?? UNITS.at(-1);
}

/** Such as "12.46 GiB", "486 MiB", "37.5 MiB" or "0 B". */
export function bytesText(bytes) {
  const unit = unitOf(bytes);
  const value = bytes / unit.bytes;
  const whole = unit.name === "B";
  const digits = whole ? 0 : value >= 100 ? 0 : value >= 10 && unit.name !== "GiB" ? 1 : 2;
  return `${value.toFixed(digits)} ${unit.name}`;
}

/** Such as "8 GiB" or "5.25 GiB": no zeros at the end, for sentences. */
export function shortText(bytes) {
  const [number, unit] = bytesText(bytes).split(" ");
  return `${Number(number)} ${unit}`;
}

/** Such as "4.4 GiB" or "358 MiB": what a sentence calls "about". */
export function roughText(bytes) {
  const unit = unitOf(bytes);
  return unit.name === "GiB" ? `${(bytes / unit.bytes).toFixed(1)} GiB` : shortText(bytes);
}
