// Files and folders that the reader drops or picks, as text.

const MAX_FILES = 2_000;
const MAX_BYTES = 24 * 2 ** 20; // below what the server takes in one request
const SNIFF_BYTES = 8_192;
const SKIPPED_FOLDERS = new Set([
  ".cache", ".git", ".hg", ".idea", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".svn", ".tox",
  ".venv", "__pycache__", "build", "dist", "node_modules", "target", "venv",
]);

/**
 * @typedef {{ path: string, file: File }} Found
 * @typedef {{ name: string, text: string, skipped: number }} Packed
 */

/** Files that were chosen with a picker; those of a folder have a path. */
export function chosenFiles(list) {
  return [...list].map((file) => ({ path: file.webkitRelativePath || file.name, file }));
}

/**
 * All files below what was dropped.
 *
 * @param {DataTransfer} transfer
 * @returns {Promise<Found[]>}
 */
export async function droppedFiles(transfer) {
  // The entries have to be taken before the first await: the transfer is emptied then.
  const entries = [...transfer.items]
    .filter((item) => item.kind === "file")
    .map((item) => item.webkitGetAsEntry() ?? item.getAsFile());
  const found = [];
  for (const entry of entries) await collect(entry, "", found);
  return found;
}

async function collect(entry, folder, found) {
  if (!entry || found.length > MAX_FILES) return;
  const path = folder + entry.name;
  if (entry instanceof File) found.push({ path, file: entry });
  else if (entry.isFile) found.push({ path, file: await promised(entry, "file") });
  else if (!SKIPPED_FOLDERS.has(entry.name)) {
    const reader = entry.createReader();
    // A reader gives at most a hundred entries at a time, and none at the end.
    for (let some = [1]; some.length; ) {
      some = await promised(reader, "readEntries");
      for (const child of some) await collect(child, `${path}/`, found);
    }
  }
}

function promised(owner, method) {
  return new Promise((resolve, reject) => owner[method](resolve, reject));
}

/**
 * Joins the files of each folder, and leaves single files apart.
 *
 * @param {Found[]} found
 * @returns {Promise<Packed[]>}
 * @throws {Error} with a message for the reader if it is too much
 */
export async function pack(found) {
  const wanted = found.filter(({ path }) => !isSkipped(path));
  if (wanted.length > MAX_FILES) throw new Error(`More than ${MAX_FILES} files are too many.`);
  const bytes = wanted.reduce((sum, { file }) => sum + file.size, 0);
  if (bytes > MAX_BYTES) {
    const mebibytes = (bytes / 2 ** 20).toFixed(0);
    throw new Error(`${mebibytes} MiB of files are too much; 24 MiB are allowed.`);
  }
  wanted.sort((one, other) => (one.path < other.path ? -1 : 1));
  const packs = new Map();
  for (const { path, file } of wanted) {
    const text = await textOf(file);
    const name = path.includes("/") ? `${path.split("/")[0]}/` : path;
    const parts = packs.get(name) ?? { name, text: "", skipped: 0 };
    packs.set(name, parts);
    if (text === null) parts.skipped += 1;
    else parts.text += `${parts.text && "\n\n"}${withHeader(path, text)}`;
  }
  return [...packs.values()];
}

/** A file's text below its name, in a fence that nothing in it can close: so a prompt has it. */
export function withHeader(path, text) {
  const fence = fenceAround(text);
  return `File: ${path}\n${fence}\n${text}${text.endsWith("\n") ? "" : "\n"}${fence}`;
}

/** Marks of a fence that are longer than any in the text. */
export function fenceAround(text) {
  const marks = text.match(/`{3,}/g) ?? [];
  return "`".repeat(marks.reduce((most, { length }) => Math.max(most, length + 1), 3));
}

function isSkipped(path) {
  return path.split("/").slice(0, -1).some((folder) => SKIPPED_FOLDERS.has(folder));
}

/** A file's text, or null if it is not text. */
async function textOf(file) {
  const start = new Uint8Array(await file.slice(0, SNIFF_BYTES).arrayBuffer());
  if (start.includes(0)) return null;
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    return null;
  }
}
