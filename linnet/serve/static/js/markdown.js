// Markdown to elements. HTML in it is shown, not obeyed; a picture becomes a link to it.

import { CodeBlock } from "./code_block.js";
import { sanitize } from "./sanitize.js";
import { Lexer, Marked } from "../vendor/marked.js";

const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };

const marked = new Marked({
  gfm: true,
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escapeHtml(text)}</p>` : escapeHtml(text)),
    image: ({ href, text }) => `<a href="${escapeHtml(href)}">${escapeHtml(text || href)}</a>`,
  },
});

/**
 * Cuts markdown into its blocks: paragraphs, lists, fences, ...; what a list holds is not cut.
 *
 * @param {string} text with "\n" line ends
 * @returns {{ type: string, raw: string, lang?: string, text?: string }[]} their raws, joined, are
 *   the text
 */
export function markdownBlocks(text) {
  return unlessTooDeep(
    () => new Lexer().blockTokens(text, []),
    () => [{ type: "text", raw: text }],
  );
}

/** @returns {DocumentFragment} */
export function renderMarkdown(text) {
  const fragment = sanitize(toHtml(text));
  for (const code of fragment.querySelectorAll("pre > code")) {
    const block = new CodeBlock(/language-(\S+)/.exec(code.className)?.[1] ?? "");
    block.show(code.textContent.replace(/\n$/, ""), true);
    code.parentElement.replaceWith(block.element);
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = document.createElement("div");
    frame.className = "table-frame";
    table.replaceWith(frame);
    frame.append(table);
  }
  return fragment;
}

function toHtml(text) {
  return unlessTooDeep(
    () => marked.parse(text),
    () => `<p>${escapeHtml(text)}</p>`,
  );
}

/** The parser calls itself for quotes in quotes, and thousands of them exhaust the stack. */
function unlessTooDeep(parse, instead) {
  try {
    return parse();
  } catch (error) {
    if (error instanceof RangeError) return instead();
    throw error;
  }
}

function escapeHtml(text) {
  return text.replace(/[&<>"']/g, (character) => ESCAPES[character]);
}
