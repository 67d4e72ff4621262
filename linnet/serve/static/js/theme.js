// Light or dark: as the system wants it, or as the reader chose.

const PLACE = "linnet.theme";
const THEMES = ["auto", "light", "dark"];

export function currentTheme() {
  const theme = localStorage.getItem(PLACE);
  return THEMES.includes(theme) ? theme : "auto";
}

/** Changes to the next theme, and returns its name. */
export function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(currentTheme()) + 1) % THEMES.length];
  localStorage.setItem(PLACE, theme);
  applyTheme();
  return theme;
}

function applyTheme() {
  document.documentElement.dataset.theme = currentTheme();
}

applyTheme();
