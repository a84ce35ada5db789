// Out of the page: to the clipboard, or to a file.

/** Copies the text; false where the browser refuses. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyOldWay(text); // a page that came over http from another machine has no clipboard
  }
}

function copyOldWay(text) {
  const area = document.createElement("textarea");
  area.value = text;
  area.style.cssText = "position: fixed; opacity: 0";
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  return isCopied;
}

/** Saves the record as a file named after the probe and the time. */
export function saveJson(record) {
  const now = new Date().toISOString().slice(0, 19).replaceAll(":", "-");
  const label = record.label.replace(/[^\p{L}\p{N}_-]+/gu, "_").slice(0, 40);
  const blob = new Blob([JSON.stringify(record, null, 2)], { type: "application/json" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${["vram_probe", label, now].filter(Boolean).join("_")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
