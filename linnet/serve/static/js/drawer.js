// A panel at the side of a wide page, and over a narrow one.

const NARROW = matchMedia("(max-width: 860px)");

/**
 * @param {HTMLDialogElement} dialog
 * @param {HTMLElement} button that opens and closes it
 * @param {boolean} isOpenWide whether it is open on a wide page from the start
 */
export function drawer(dialog, button, isOpenWide) {
  let wasOpenWide = isOpenWide;

  function open() {
    if (dialog.open) return;
    if (NARROW.matches) dialog.showModal();
    else dialog.setAttribute("open", ""); // show() would take the focus
    changed();
  }

  function close() {
    dialog.close();
    changed();
  }

  function changed() {
    button.setAttribute("aria-expanded", String(dialog.open));
    if (!NARROW.matches) wasOpenWide = dialog.open;
  }

  button.addEventListener("click", () => (dialog.open ? close() : open()));
  dialog.addEventListener("close", changed);
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog && NARROW.matches) close(); // a click beside it
  });
  for (const closer of dialog.querySelectorAll("[data-closes]")) {
    closer.addEventListener("click", close);
  }
  NARROW.addEventListener("change", () => {
    const shouldOpen = !NARROW.matches && wasOpenWide;
    dialog.close();
    if (shouldOpen) open();
  });
  if (isOpenWide && !NARROW.matches) open();

  return { open, close, closeIfNarrow: () => NARROW.matches && close() };
}
