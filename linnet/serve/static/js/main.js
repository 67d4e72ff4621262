// Joins the parts of the page.

import { createApi } from "./api.js";
import { openChatStore } from "./chat_store.js";
import { shownTurns } from "./chat_tree.js";
import { Chats } from "./chats.js";
import { Composer } from "./composer.js";
import { contextTokens, toldTokens } from "./context.js";
import { byId, setIcon } from "./dom.js";
import { drawer } from "./drawer.js";
import { fillEmptyState } from "./empty_state.js";
import { exportJson, exportMarkdown } from "./export.js";
import { plural } from "./format.js";
import { followEnd } from "./scroll.js";
import { ServerBadge } from "./server_badge.js";
import { loadApiKey, loadSettings } from "./settings.js";
import { SettingsPanel } from "./settings_panel.js";
import { Sidebar } from "./sidebar.js";
import { currentTheme, nextTheme } from "./theme.js";
import { bindThinkingBudget } from "./thinking_budget.js";
import { ThreadView } from "./thread_view.js";
import { announce, toast } from "./toast.js";
import { parseTools, ToolsError } from "./tools.js";

const CONTEXT_AFTER_MS = 400;

const settings = loadSettings();
let contextTimer = 0;
const api = createApi(loadApiKey);
const store = await openChatStore();
const badge = new ServerBadge(api, settings, showContext);
const chats = new Chats({
  api,
  store,
  settings,
  model: () => badge.model?.id ?? settings.model,
  events: {
    onShown: showChat,
    onGrown: (turnId) => thread.grow(turnId),
    onListed: showList,
    onAnswered: tellAnswered,
    onProblem: toast,
  },
});
const scroll = followEnd(byId("scroller"), byId("to-end"));
const thread = new ThreadView(byId("thread"), {
  regenerate: (turnId) => attempt(() => chats.regenerate(turnId)),
  resend: (turnId, text) => attempt(() => chats.resend(turnId, text)),
  sendResults: (turnId, results) => attempt(() => chats.sendResults(turnId, results)),
  choose: (turnId) => attempt(() => chats.choose(turnId)),
  onDrawn: showGrowth,
});
const composer = new Composer({
  send: (text, attachments) => attempt(() => chats.send(text, attachments)),
  stop: () => chats.stop(),
  editLast: () => thread.editLast(),
  countTokens: (prompt, signal) => api.countTokens({ prompt, add_special_tokens: false }, signal),
  onProblem: toast,
});
const sidebar = new Sidebar({ open: openChat, remove: removeChat });
const sidebarDrawer = drawer(byId("sidebar"), byId("toggle-sidebar"), true);
const panel = new SettingsPanel(settings, showSettings, () => badge.reload());
const panelDrawer = drawer(byId("settings"), byId("toggle-settings"), false);

/** Changes the shown chat; returns false, and tells why, if that cannot be done now. */
function attempt(act) {
  if (chats.isRunning) {
    toast("Stop the answer that is being written first.");
    return false;
  }
  try {
    act();
  } catch (error) {
    if (!(error instanceof ToolsError)) throw error;
    toast(error.message);
    panelDrawer.open();
    panel.focusTools();
    return false;
  }
  if (chats.isRunning) scroll.jump();
  return true;
}

function showChat() {
  const chat = chats.shown;
  const isEmpty = shownTurns(chat).length === 0;
  byId("empty").hidden = !isEmpty;
  byId("title").textContent = chat.title || "New chat";
  byId("export").hidden = isEmpty;
  document.title = chat.title ? `${chat.title} · linnet` : "linnet";
  history.replaceState(null, "", isEmpty ? "./" : `#${chat.id}`);
  thread.show(chat);
  if (isEmpty) scroll.release();
  composer.setRunning(chats.isRunning);
  showContext();
}

function showGrowth() {
  scroll.follow();
  const past = chats.isRunning ? toldTokens(chats.shown) : null;
  if (past !== null) composer.setContext({ past, limit: badge.model?.max_model_len });
}

async function showContext() {
  const { shown, isRunning } = chats;
  if (isRunning || !badge.model) return;
  const past = await contextTokens(shown, settings, (what) => api.countTokens(what));
  if (shown === chats.shown) composer.setContext({ past, limit: badge.model?.max_model_len });
}

function showContextSoon() {
  clearTimeout(contextTimer);
  contextTimer = setTimeout(showContext, CONTEXT_AFTER_MS);
}

async function showList() {
  sidebar.show(await store.list(), chats.shown.id, chats.runningIds);
}

function showSettings() {
  let label = "";
  try {
    const { length } = parseTools(settings.tools);
    label = length ? plural(length, "tool") : "";
  } catch (error) {
    if (!(error instanceof ToolsError)) throw error;
    label = "wrong tools";
  }
  byId("tool-count").hidden = !label;
  byId("tool-count-label").textContent = label;
  showContextSoon();
}

function tellAnswered({ state, stats, error }) {
  const tokens = plural(stats.completionTokens, "token");
  if (state === "failed") {
    if (error.status === 401) openKey();
    announce(`The answer failed: ${error.message}`);
    badge.reload();
  } else announce(state === "stopped" ? `Stopped after ${tokens}` : `Answer of ${tokens} complete`);
}

function openKey() {
  panelDrawer.open();
  panel.focusKey();
}

async function openChat(id) {
  const isThere = await chats.open(id);
  sidebarDrawer.closeIfNarrow();
  scroll.jump();
  showList();
  return isThere;
}

async function removeChat(id) {
  const restore = await chats.remove(id);
  toast("Chat deleted", { label: "Undo", run: restore });
}

function beginChat() {
  chats.begin();
  sidebarDrawer.closeIfNarrow();
  showList();
  composer.focus();
}

function pickExample({ prompt, file, tools }) {
  if (tools) panel.addTools(tools);
  composer.fill(prompt, file?.());
}

function showTheme(theme) {
  const label = `Theme: ${theme}`;
  setIcon(byId("theme"), theme === "auto" ? "contrast" : theme === "dark" ? "moon" : "sun");
  byId("theme").title = label;
  byId("theme").setAttribute("aria-label", label);
}

function onKey(event) {
  const isTyping = event.target.matches("input, textarea, select");
  if (event.key === "Escape" && !document.querySelector("dialog:modal")) {
    const isInSettings = byId("settings").contains(event.target);
    if (chats.isRunning && !isInSettings) chats.stop();
    else panelDrawer.close();
    composer.focus();
  } else if (event.key === "/" && !isTyping) {
    event.preventDefault();
    composer.focus();
  } else if (event.key === "O" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    beginChat();
  }
}

byId("new-chat").addEventListener("click", beginChat);
byId("new-chat-narrow").addEventListener("click", beginChat);
byId("theme").addEventListener("click", () => showTheme(nextTheme()));
byId("export-markdown").addEventListener("click", () => exportMarkdown(chats.shown));
byId("export-json").addEventListener("click", () => exportJson(chats.shown));
byId("badge").addEventListener("click", () => {
  panelDrawer.open();
  if (byId("badge").dataset.state === "locked") panel.focusKey();
  badge.refresh();
});
byId("tool-count").addEventListener("click", () => {
  panelDrawer.open();
  panel.focusTools();
});
byId("delete-all").addEventListener("click", () => {
  if (confirm("Delete all chats of this browser? This cannot be undone.")) chats.removeAll();
});
addEventListener("keydown", onKey);
addEventListener("focus", showList);

fillEmptyState(byId("examples"), pickExample);
bindThinkingBudget(settings);
showTheme(currentTheme());
showSettings();
const wasOpen = location.hash.slice(1);
if (!(wasOpen && (await openChat(wasOpen)))) beginChat();
badge.refresh();
