// Keeps the end of a growing page in view, until the reader scrolls up.

const NEAR_PX = 48;

/**
 * @param {HTMLElement} area that scrolls
 * @param {HTMLElement} button that takes the reader to the end
 */
export function followEnd(area, button) {
  let isFollowing = false;
  let lastTop = 0;

  function distance() {
    return area.scrollHeight - area.scrollTop - area.clientHeight;
  }

  area.addEventListener(
    "scroll",
    () => {
      // Only a move upwards is the reader's wish; the page itself moves only down.
      if (area.scrollTop < lastTop - 1 && distance() > 1) isFollowing = false;
      if (distance() < NEAR_PX && area.scrollTop >= lastTop) isFollowing = true;
      lastTop = area.scrollTop;
      button.hidden = isFollowing || distance() < NEAR_PX;
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
    if (isFollowing) area.scrollTop = area.scrollHeight;
    else button.hidden = distance() < NEAR_PX;
  }

  return { jump, release, follow };
}
