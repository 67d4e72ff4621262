// An answer's markdown while it grows: finished blocks stay, only the last one is drawn again.

import { CodeBlock } from "./code_block.js";
import { markdownBlocks, renderMarkdown } from "./markdown.js";

const BUDGET_MS = 12; // of work before the page gets a turn
const PIECE_LEN = 8_000; // characters that are cut into blocks at once
const MAX_BLOCK_LEN = 32_000; // a longer block is cut, so that no text can stop the page
const PART_LEN = 16_000; // characters that are laid out together, only where they are seen
const SURE_LEN = 40; // characters of a block after which it is no continuation of the one before

export class MarkdownView {
  #element;
  /** Where blocks are added: the element itself, or its last part if the text is long. */
  #part;
  #partStart = 0;
  #text = "";
  #isWhole = false;
  /** Characters of the text that are drawn for good. */
  #settled = 0;
  /** What is drawn of the rest. */
  #tail = [];
  /** The fence that is open at the end of the text. */
  #fence = null;

  /** @param {HTMLElement} element whose only content this is */
  constructor(element) {
    this.#element = this.#part = element;
  }

  /**
   * Draws `text`, or as much of it as fits into a moment.
   *
   * @param {string} text that begins with what was drawn before
   * @param {boolean} isWhole whether it will not grow any more
   * @returns {boolean} whether all is drawn; if not, call again
   */
  show(text, isWhole) {
    this.#text = text.includes("\r") ? text.replace(/\r\n?/g, "\n") : text;
    this.#isWhole = isWhole;
    const deadline = performance.now() + BUDGET_MS;
    while (this.#settled < this.#text.length) {
      if (!(this.#fence ? this.#growFence() : this.#settleBlocks())) break;
      if (performance.now() > deadline) return false;
    }
    return true;
  }

  /** Begins a part of the page, which is laid out for itself, once there is enough in the last. */
  #beginPart() {
    if (this.#settled < this.#partStart + PART_LEN) return;
    this.#partStart = this.#settled;
    this.#part = document.createElement("div");
    this.#part.className = "part";
    this.#element.append(this.#part);
  }

  /** Draws the next blocks; returns whether there may be more to do. */
  #settleBlocks() {
    for (let length = PIECE_LEN; ; length *= 2) {
      const piece = this.#piece(length);
      const isCut = this.#settled + piece.length < this.#text.length;
      const blocks = markdownBlocks(piece);
      const open = this.#isWhole && !isCut ? blocks.length : firstOpenBlock(blocks);
      if (this.#openFence(blocks, open)) return true;
      if (open > 0) {
        this.#settle(blocks.slice(0, open));
        if (isCut) return true;
      } else if (isCut) {
        if (length < MAX_BLOCK_LEN) continue;
        this.#settle(blocks);
        return true;
      }
      this.#drawTail(joined(blocks.slice(open)));
      return false;
    }
  }

  /** The text to cut next, up to the end of a line if it is not the last. */
  #piece(length) {
    const end = this.#settled + length;
    if (end >= this.#text.length) return this.#text.slice(this.#settled);
    const lineEnd = this.#text.lastIndexOf("\n", end) + 1;
    return this.#text.slice(this.#settled, lineEnd > this.#settled ? lineEnd : end);
  }

  #settle(blocks) {
    this.#beginPart();
    const raw = joined(blocks);
    this.#drawTail(raw);
    this.#tail = [];
    this.#settled += raw.length;
  }

  #drawTail(raw) {
    for (const node of this.#tail) node.remove();
    const fragment = renderMarkdown(raw);
    this.#tail = [...fragment.childNodes];
    this.#part.append(fragment);
  }

  /** If the last block is code in a fence, settles what is before it and begins to grow it. */
  #openFence(blocks, open) {
    const last = blocks.at(-1);
    const opening = last?.type === "code" && /^( {0,3})(`{3,}|~{3,})([^\n]*)\n/.exec(last.raw);
    if (!opening || open < blocks.length - 1) return false;
    if (blocks.length > 1) this.#settle(blocks.slice(0, -1));
    this.#drawTail("");
    const [line, indent, marker, info] = opening;
    const block = new CodeBlock(info.trim().split(/\s/)[0]);
    this.#part.append(block.element);
    const start = this.#settled + line.length;
    const close = new RegExp(`^ {0,3}${marker[0]}{${marker.length},}[ \\t]*(?:\\n|$)`, "gm");
    this.#fence = { block, start, close, indent: indent.length, scanned: start };
    return true;
  }

  /** Draws more of the open fence; returns whether it has ended before the text. */
  #growFence() {
    const { block, start, close, indent, scanned } = this.#fence;
    close.lastIndex = scanned;
    const closing = close.exec(this.#text);
    const isClosed = closing && (this.#isWhole || closing[0].endsWith("\n"));
    // A line of marks that has no end yet may turn out to close the fence, so it is not shown.
    const end = closing ? closing.index : this.#text.length;
    const codeEnd = this.#text[end - 1] === "\n" ? Math.max(start, end - 1) : end;
    let code = this.#text.slice(start, codeEnd);
    if (indent) code = code.replace(new RegExp(`^ {1,${indent}}`, "gm"), "");
    block.show(code, isClosed || this.#isWhole);
    if (isClosed || this.#isWhole) {
      this.#settled = isClosed ? closing.index + closing[0].length : this.#text.length;
      this.#fence = null;
      return true;
    }
    this.#fence.scanned = Math.max(start, this.#text.lastIndexOf("\n") + 1);
    return false;
  }
}

/** The number of blocks that more text cannot change. */
function firstOpenBlock(blocks) {
  let last = blocks.length - 1;
  while (last > 0 && blocks[last].type === "space") last -= 1;
  const { raw } = blocks[last];
  const isSure = raw.includes("\n") || raw.length >= SURE_LEN;
  if (isSure) return last;
  do last -= 1;
  while (last > 0 && blocks[last].type === "space");
  return Math.max(0, last);
}

function joined(blocks) {
  return blocks.map((block) => block.raw).join("");
}
