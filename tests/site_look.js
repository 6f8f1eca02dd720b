// Looks at the pages in NAMES, one after the other in a frame: width, code that scrolls, errors, axe.
const seriously = (results) => results.violations
  .filter((rule) => ["serious", "critical"].includes(rule.impact))
  .flatMap((rule) => rule.nodes.map((node) => `${rule.id}: ${node.html.slice(0, 200)}`));

async function check(page, options, except = "script") {
  // axe knows one document: those in frames, the viewers, are asked on their own
  const script = page.createElement("script");
  script.textContent = AXE;
  page.head.append(script);
  const fast = { iframes: false, resultTypes: ["violations"], selectors: false };
  const { axe } = page.defaultView;
  const found = seriously(await axe.run({ include: page, exclude: except }, { ...fast, ...options }));
  for (const inner of page.querySelectorAll("iframe"))
    found.push(...await check(inner.contentDocument, options, except));
  return found;
}

async function look(name) {
  const frame = document.body.appendChild(document.createElement("iframe"));
  Object.assign(frame.style, { width: "390px", height: "900px", border: 0 });
  frame.src = `${name}.html`;
  await new Promise((resolve) => frame.addEventListener("load", resolve));
  const page = frame.contentDocument;
  const report = { phone: page.documentElement.scrollWidth };
  frame.style.width = "1440px";
  report.height = page.documentElement.scrollHeight;
  const blocks = [...page.querySelectorAll("pre")];
  report.blocks = blocks.length;
  report.scrolling = blocks.filter((block) => block.scrollWidth > block.clientWidth)
    .map((block) => block.textContent);
  // the colours of code are Quarto's
  const contrast = { runOnly: ["color-contrast"] };
  report.light = await check(page, { rules: { "color-contrast": { enabled: false } } });
  report.light.push(...await check(page, contrast, "pre"));
  page.body.className = "quarto-dark";
  page.getElementById("dark").media = "all";
  report.dark = await check(page, contrast, "pre");
  report.errors = frame.contentWindow.errors;
  frame.remove();
  return report;
}

addEventListener("load", async () => {
  const reports = {};
  for (const name of NAMES)
    reports[name] = await look(name).catch((error) => ({ errors: [String(error)] }));
  const pre = document.body.appendChild(document.createElement("pre"));
  Object.assign(pre, { id: "report", textContent: JSON.stringify(reports) });
});
