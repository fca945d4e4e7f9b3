(() => {
  "use strict";
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Charts. Expressions are interpreted, not compiled: the page's policy forbids eval.
  const options = {
    actions: false, ast: true, defaultStyle: false, renderer: "svg",
    tooltip: { disableDefaultStyle: true },
  };
  const draw = async (plot) => {
    if (plot.dataset.drawn) return;
    plot.dataset.drawn = "yes";
    try {
      await vegaEmbed(plot, JSON.parse(document.getElementById(plot.dataset.chart).textContent), options);
    } catch (error) {
      console.error(error);
      plot.classList.add("failed");
      plot.textContent = "This chart could not be drawn; the tables contain its figures.";
    }
    plot.removeAttribute("aria-busy");
  };
  const drawShown = () => all("[data-chart]").filter((plot) => !plot.closest("[hidden]")).forEach(draw);
  all("[name=heat]").forEach((radio) => radio.addEventListener("change", () => {
    all("[data-panel]").forEach((panel) => { panel.hidden = panel.dataset.panel !== radio.value; });
    drawShown();
  }));

  // Clicking a heading sorts a table by it: numbers descending, texts ascending; a second click reverses the order.
  const names = new Intl.Collator("en", { numeric: true });
  const compare = (numeric, direction) => (one, other) => {
    const missing = (cell) => cell === "" || (numeric && Number.isNaN(Number(cell)));
    if (missing(one.value) || missing(other.value)) return missing(one.value) - missing(other.value);
    return direction * (numeric ? one.value - other.value : names.compare(one.value, other.value));
  };
  const sort = (table, heading) => {
    const numeric = heading.classList.contains("number");
    const before = heading.getAttribute("aria-sort");
    const direction = before ? (before === "ascending" ? -1 : 1) : (numeric ? -1 : 1);
    all("th[aria-sort]", table.tHead).forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    const at = heading.cellIndex;
    const rows = [...table.tBodies[0].rows].map((row) => ({ row, value: row.cells[at].dataset.value ?? "" }));
    table.tBodies[0].append(...rows.sort(compare(numeric, direction)).map(({ row }) => row));
  };
  all("table.sortable").forEach((table) => all("th", table.tHead).forEach((heading) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sort(table, heading));
    heading.append(button);
  }));

  // One level's answers at a time.
  all("[data-selects]").forEach((select) => {
    const choose = () => all(`[data-group=${select.dataset.selects}]`).forEach((group) => { group.hidden = group.id !== select.value; });
    select.addEventListener("change", choose);
    select.parentElement.hidden = false;
    choose();
  });

  // Commands can be copied.
  const say = (text) => { document.getElementById("status").textContent = text; };
  const copy = async (button, code) => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
      say("Copied");
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
      say("The command is selected: copy it with the keyboard");
    }
    setTimeout(() => { button.textContent = "Copy"; say(""); }, 2500);
  };
  all(".command").forEach((command) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.setAttribute("aria-label", "Copy the command");
    button.addEventListener("click", () => copy(button, command.querySelector("code")));
    command.append(button);
    command.classList.add("copies");
  });

  // In print nothing can be opened, so short details are printed open.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = all("details[data-print]:not([open])");
    opened.forEach((each) => { each.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((each) => { each.open = false; }));

  drawShown();
})();
