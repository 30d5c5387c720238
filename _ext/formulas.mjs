// A formula a line comes in, as JSON [TeX, whether it stands on its own]; its MathML goes out.
import { createInterface } from "node:readline";
import mathjax from "mathjax";

const { tex2mmlPromise } = await mathjax.init({ loader: { load: ["input/tex"] } });
for await (const line of createInterface({ input: process.stdin })) {
  const [tex, display] = JSON.parse(line);
  console.log(JSON.stringify(await tex2mmlPromise(tex, { display })));
}
