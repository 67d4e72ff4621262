// Drawing at the pace of the screen, and slower where drawing is slow.

const REST = 0.5; // times as long as the last drawing took

/**
 * Collects calls, and draws at most once per frame.
 *
 * @param {() => boolean} draw returns whether all is drawn; if not, it is called again
 * @returns {{ request: () => void, stop: () => void }}
 */
export function paced(draw) {
  let frame = 0;
  let timer = 0;
  let restUntil = 0;

  function request() {
    if (frame || timer) return;
    const wait = restUntil - performance.now();
    if (wait > 16) timer = setTimeout(nextFrame, wait);
    else nextFrame();
  }

  function nextFrame() {
    timer = 0;
    // A hidden page has no frames.
    if (document.hidden) timer = setTimeout(run, 250);
    else frame = requestAnimationFrame(run);
  }

  function run() {
    frame = timer = 0;
    const start = performance.now();
    const isDone = draw();
    const end = performance.now();
    restUntil = end + REST * (end - start);
    if (!isDone) request();
  }

  function stop() {
    cancelAnimationFrame(frame);
    clearTimeout(timer);
    frame = timer = 0;
  }

  return { request, stop };
}
