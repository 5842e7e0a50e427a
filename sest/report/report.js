// Draws the figures of the page. A figure names its colours by CSS variables, so it follows the colour scheme.
(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const settings = { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false };
  const drawn = new Set();

  function coloured(value, style) {
    if (typeof value === "string") {
      const name = /^var\((--[a-z]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((inner) => coloured(inner, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, coloured(inner, style)]));
  }

  function draw(plot) {
    const style = getComputedStyle(root);
    const { data, layout } = figures[plot.dataset.figure];
    const shown = coloured(layout, style);
    shown.font.family = getComputedStyle(document.body).fontFamily;
    shown.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom"; // a finger scrolls the page
    drawn.add(plot);
    name(plot);
    Plotly.react(plot, coloured(data, style), shown, settings);
  }

  // The groups of a map, with their colours.
  function name(plot) {
    const key = plot.parentElement.querySelector(".dots");
    if (!key) return;
    const { data, rows } = figures[plot.dataset.figure]; // a row of the table for every trace
    const groups = data.map((trace, i) => {
      const made = document.createElement("span");
      made.className = trace.marker.symbol;
      made.style.setProperty("--dot", trace.marker.color);
      made.textContent = rows[i][0];
      return made;
    });
    key.replaceChildren(...groups);
  }

  function fill(figure) {
    const box = figure.querySelector(".filled");
    if (!box || !box.parentElement.open) return;
    const { columns, rows } = figures[figure.querySelector(".plot").dataset.figure];
    const table = document.createElement("table");
    const line = (cells, tag, parent) => {
      const row = parent.insertRow();
      for (const cell of cells) {
        const made = document.createElement(tag);
        made.textContent = cell === null ? "-" : typeof cell === "number" ? Number(cell.toPrecision(4)) : cell;
        if (typeof cell === "number") made.className = "number";
        row.append(made);
      }
    };
    line(columns, "th", table.createTHead());
    const body = table.createTBody();
    for (const row of rows) line(row, "td", body);
    box.replaceChildren(table);
  }

  function choose(figure, key) {
    const plot = figure.querySelector(".plot");
    plot.dataset.figure = key;
    draw(plot);
    fill(figure);
  }

  const plots = [...document.querySelectorAll(".plot")];
  const seen = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        seen.unobserve(target);
        draw(target);
      }
    },
    { rootMargin: "600px" },
  );
  plots.forEach((plot) => seen.observe(plot));

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-figure]");
    if (!button) return;
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", other === button);
    choose(button.closest("figure"), button.dataset.figure);
  });
  document.addEventListener("change", (event) => {
    if (event.target.matches("figure select")) choose(event.target.closest("figure"), event.target.value);
  });
  for (const box of document.querySelectorAll(".filled")) {
    box.parentElement.addEventListener("toggle", () => fill(box.closest("figure")));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
  addEventListener("beforeprint", () => {
    root.classList.add("print");
    plots.forEach(draw);
  });
  addEventListener("afterprint", () => {
    root.classList.remove("print");
    plots.forEach(draw);
  });
})();
