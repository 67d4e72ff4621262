// Keeps the end of a growing page in view, until the reader scrolls up.

const NEAR_PX = 48;

/**
 * @param {HTMLElement} area that scrolls
 * @param {HTMLElement} button that takes the reader to the end
 */
export function followEnd(area, button) {
  let isFollowing = false;
  let lastTop = 0;
  /** Where the page itself has scrolled to. */
  let ownTop = -1;

  function distance() {
    return area.scrollHeight - area.scrollTop - area.clientHeight;
  }

  area.addEventListener(
    "scroll",
    () => {
      const top = area.scrollTop;
      // Only a move upwards is the reader's wish; the page itself moves only down.
      if (top < lastTop - 1 && distance() > 1) {
        isFollowing = false;
        ownTop = -1;
      } else if (top !== ownTop && top >= lastTop && distance() < NEAR_PX) {
        isFollowing = true;
      }
      lastTop = top;
      button.hidden = isFollowing || distance() < NEAR_PX;
    },
    { passive: true },
  );
  // Where text comes faster than events, the page would have moved down again before `scroll`.
  area.addEventListener(
    "wheel",
    (event) => {
      if (event.deltaY < 0 && area.scrollTop > 0) isFollowing = false;
    },
    { passive: true },
  );
  button.addEventListener("click", jump);
  new ResizeObserver(() => isFollowing && follow()).observe(area);

  /** Shows the end, and keeps to it. */
  function jump() {
    isFollowing = true;
    follow();
  }

  /** Shows the start, and stays there. */
  function release() {
    isFollowing = false;
    area.scrollTop = lastTop = 0;
    button.hidden = true;
  }

  /** Shows the end if the reader is there. */
  function follow() {
    if (isFollowing) {
      area.scrollTop = area.scrollHeight;
      ownTop = area.scrollTop;
    } else button.hidden = distance() < NEAR_PX;
  }

  return { jump, release, follow };
}
