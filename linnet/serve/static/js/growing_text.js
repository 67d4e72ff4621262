// Plain text that grows, cut into pieces so that what is laid out already stays so.

const PIECE_LEN = 8_000; // characters after which the next line begins a new piece
const MAX_LINE_LEN = 32_000; // characters after which even a line is cut

/** Shows text in a piece of the page that keeps its line ends (`white-space: pre`, `pre-wrap`). */
export class GrowingText {
  #parent;
  #shown = "";
  #pieceStart = 0;
  /** @type {Text | null} */
  #piece = null;

  /** @param {HTMLElement} parent whose only content this is */
  constructor(parent) {
    this.#parent = parent;
  }

  /** Shows `text`; only what is new is touched if it begins with what was shown before. */
  show(text) {
    if (!text.startsWith(this.#shown)) {
      this.#parent.replaceChildren();
      this.#shown = "";
      this.#piece = null;
    }
    let place = this.#shown.length;
    while (place < text.length) {
      if (!this.#piece) this.#begin(place);
      const end = this.#pieceEnd(text);
      this.#piece.appendData(text.slice(place, end ?? text.length));
      if (end !== null) this.#piece = null;
      place = end ?? text.length;
    }
    this.#shown = text;
  }

  #begin(place) {
    const holder = document.createElement("span");
    holder.className = "text-piece";
    this.#piece = document.createTextNode("");
    this.#pieceStart = place;
    holder.append(this.#piece);
    this.#parent.append(holder);
  }

  #pieceEnd(text) {
    const lineEnd = text.indexOf("\n", this.#pieceStart + PIECE_LEN) + 1;
    const limit = this.#pieceStart + MAX_LINE_LEN;
    if (lineEnd && lineEnd <= limit) return lineEnd;
    return text.length > limit ? limit : null;
  }
}
